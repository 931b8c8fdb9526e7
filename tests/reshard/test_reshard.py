"""Resharded is byte for byte what `split` would have written, or nothing is written at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard import LayoutOptions, SplitRequest, merge_shards, reshard_shards, split_adapter
from lorashard.errors import ManifestError, PlacementError, ShardError, VerificationError
from lorashard.writing.blocks import split_into_blocks
from lorashard.writing.restore import proof_bytes
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Adapter, Spec, build
from tests.bench.generate import write_adapter
from tests.bench.measure import run_command
from tests.bench.models import MODELS, scale_layers
from tests.imports import RUN, imported_by
from tests.strategies import rank_lists, specs
from tests.tiny import (
    MODULE,
    RANK_FILES,
    contents,
    edit_json,
    flip_bit,
    per_expert_tensors,
    save_adapter,
    save_pickled,
    split_wrongly_placed,
)

CASES = [Spec(layout) for layout in LAYOUTS] + [Spec(x, gated=False) for x in NON_GATED_LAYOUTS]
FILES = ("replicated.safetensors", *RANK_FILES)
case_name = "{0.layout}-gated={0.gated}".format
run = settings(max_examples=30, deadline=None)


@dataclass(frozen=True)
class Ask:
    """A placement as it is asked for; expert_map: what stands in the file."""

    ep_size: int
    strategy: Any = "linear"
    expert_map: Any = None

    def options(self, folder: Path) -> dict[str, Any]:
        """Arguments of SplitRequest and reshard_shards alike."""
        path = None
        if self.expert_map is not None:
            path = folder / "map.json"
            path.write_text(json.dumps(self.expert_map), encoding="utf-8")
        return {"ep_size": self.ep_size, "strategy": self.strategy, "expert_map": path}


class Chain:
    """One adapter in a folder, and shards of it that follow from each other."""

    def __init__(self, folder: Path, adapter: Adapter, dtype: str | None = None) -> None:
        self.folder = folder
        self._told = {"dtype": dtype, "options": LayoutOptions(**adapter.options)}
        self._adapter = adapter.write(folder / "adapter")

    def split(self, ask: Ask, name: str) -> Path:
        request = SplitRequest(**ask.options(self.folder), **self._told)
        split_adapter(self._adapter, self.folder / name, request, force=True)
        return self.folder / name

    def check(self, asks: list[Ask]) -> None:
        """Reshard from each to the next; each result must be what `split` writes."""
        self.split(asks[0], "0")
        for number, ask in enumerate(asks[1:]):
            before, after = self.folder / str(number), self.folder / str(number + 1)
            reshard_shards(before, after, **ask.options(self.folder))
            assert contents(after) == contents(self.split(ask, "wanted")), ask


def layer_map(adapter: Adapter) -> Ask:
    """Redundant experts, other slot orders, and a layer of its own."""
    layers = {"1": [[3, 0], [2], [1, 3]]}
    return Ask(3, expert_map={"ranks": [[2, 0], [1, 0, 3], []], "layers": layers})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("spec", CASES, ids=case_name)
def test_each_layout_goes_from_placement_to_placement(
    tmp_path: Path, spec: Spec, dtype: str | None
) -> None:
    adapter = build(replace(spec, num_layers=2, extras=True))
    asks = [Ask(3), Ask(2, "round_robin"), layer_map(adapter), Ask(1), Ask(6), Ask(4), Ask(2)]
    Chain(tmp_path, adapter, dtype).check(asks)


PARTIAL = Spec("L1", num_experts=128, experts=(0, *range(50, 90), 127), lora_ranks={60: 1, 127: 3})


@pytest.mark.parametrize(
    "spec", [PARTIAL, *(Spec(layout, num_experts=128) for layout in LAYOUTS)], ids=case_name
)
def test_each_layout_is_resharded_at_the_size_of_a_real_model(tmp_path: Path, spec: Spec) -> None:
    chain = Chain(tmp_path, build(replace(spec, extras=True)))
    chain.check([Ask(8), Ask(3, "round_robin"), Ask(2)])


@st.composite
def asks(draw: st.DrawFn, num_experts: int, num_layers: int) -> Ask:
    ep_size = draw(st.integers(1, 10))
    strategy = draw(st.sampled_from(["linear", "round_robin", "explicit"]))
    if strategy != "explicit":
        return Ask(ep_size, strategy)
    if 1 in (ep_size, num_experts):
        return Ask(ep_size)
    # Where every rank lists all experts, a map can be read in two ways and is refused.
    ranks = rank_lists(num_experts, ep_size).filter(
        lambda lists: any(len(experts) < num_experts for experts in lists)
    )
    layers = draw(st.dictionaries(st.integers(0, num_layers - 1).map(str), ranks))
    return Ask(ep_size, expert_map={"ranks": draw(ranks), "layers": layers})


@given(data=st.data(), block_bytes=st.sampled_from([None, 1, 8, 40]))
@run
def test_any_placement_follows_from_any_other(data: st.DataObject, block_bytes: int | None) -> None:
    spec = data.draw(specs(fill="bits"))
    dtypes = [None, None, "float32", "bfloat16"] if spec.dtype != torch.float64 else [None]
    chosen = data.draw(st.lists(asks(spec.num_experts, spec.num_layers), min_size=2, max_size=3))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if block_bytes:
            patch.setattr(split_into_blocks, "__defaults__", (block_bytes, block_bytes))
        Chain(Path(name), build(spec), data.draw(st.sampled_from(dtypes))).check(chosen)


def test_a_round_trip_gives_the_first_shards_back(tmp_path: Path) -> None:
    chain = Chain(tmp_path, build(Spec("L2", num_layers=2, extras=True)))
    chain.split(Ask(4), "there")
    reshard_shards(tmp_path / "there", tmp_path / "away", 3, strategy="round_robin")
    reshard_shards(tmp_path / "away", tmp_path / "back", 4)
    assert contents(tmp_path / "back") == contents(tmp_path / "there")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards on two ranks; their source is gone."""
    adapter = save_adapter(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=2))
    shutil.rmtree(adapter)
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def _nothing_half_done(tmp_path: Path) -> Iterator[None]:
    yield
    assert [name for name in os.listdir(tmp_path) if "lorashard" in name] == []


def refused(shards: Path, kind: type[ShardError] = ShardError) -> str:
    """Resharding raises `kind`, changes nothing and leaves nothing; the message."""
    before = contents(shards.parent)
    with pytest.raises(kind) as caught:
        reshard_shards(shards, shards.parent / "new" / "out", 3)
    assert contents(shards.parent) == before
    assert not (shards.parent / "new").exists()
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_the_source_adapter_is_not_needed(shards: Path, tmp_path: Path) -> None:
    reshard_shards(str(shards), str(tmp_path / "out"), 3)
    merge_shards(tmp_path / "out", tmp_path / "merged")
    expected = save_adapter(tmp_path / "expected")
    assert contents(tmp_path / "merged") == contents(expected)


def test_the_same_placement_again_gives_the_same_files(shards: Path, tmp_path: Path) -> None:
    reshard_shards(shards, tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(shards)


def test_shards_of_a_pickle_keep_what_is_said_of_it(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    for ep_size in (2, 3):
        request = SplitRequest(ep_size, allow_pickle=True)
        split_adapter(adapter, tmp_path / str(ep_size), request)
    reshard_shards(tmp_path / "2", tmp_path / "out", 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "3")


def test_progress_adds_up_to_all_old_files_and_the_proof(shards: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    manifest = reshard_shards(shards, tmp_path / "out", 3, progress=seen.append)
    proven = proof_bytes(manifest)
    assert proven > 0
    assert sum(seen) == sum((shards / name).stat().st_size for name in FILES) + proven


@pytest.mark.parametrize("remote", [False, True])
def test_a_placement_that_is_not_that_of_the_data_is_refused(tmp_path: Path, remote: bool) -> None:
    shards = split_wrongly_placed(tmp_path)
    place = shards.as_uri() if remote else shards
    with pytest.raises(VerificationError, match="with this placement, the shards hold another"):
        reshard_shards(place, tmp_path / "out", 1)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_copies_that_differ_are_refused(tmp_path: Path, dtype: str | None, remote: bool) -> None:
    (tmp_path / "map.json").write_text('{"ranks": [[0, 1], [2, 3, 0]]}')
    request = SplitRequest(2, expert_map=tmp_path / "map.json", dtype=dtype)
    shards = tmp_path / "redundant"
    split_adapter(save_adapter(tmp_path / "adapter"), shards, request)
    place = shards.as_uri() if remote else shards
    reshard_shards(place, tmp_path / "right", 1)
    placement = json.loads((shards / "lorashard.json").read_text())["placement"]
    edit_json(shards / "lorashard.json", placement=placement | {"ranks": [[0, 1], [2, 3, 1]]})
    with pytest.raises(VerificationError) as caught:
        reshard_shards(place, tmp_path / "out", 1)
    (finding,) = caught.value.findings
    assert finding.startswith(f"{RANK_FILES[1]}: what begins at byte ")
    assert finding.endswith(" differs from another copy of the same expert (and 5 more like it)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_old_file_is_refused(shards: Path, name: str) -> None:
    flip_bit(shards / name, -2)
    message = refused(shards, VerificationError)
    assert f"{shards / name}: BLAKE3 differs from the manifest's" in message


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_a_header_is_refused(shards: Path, name: str) -> None:
    length = 8 + int.from_bytes((shards / name).read_bytes()[:8], "little")
    for position in range(length):
        flip_bit(shards / name, position)
        assert name in refused(shards), position
        flip_bit(shards / name, position)


def test_a_flipped_bit_in_a_copy_that_is_not_used_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("[[0, 1, 2, 3], [3]]")
    reshard_shards(shards, tmp_path / "twice", 2, expert_map=tmp_path / "map.json")
    flip_bit(tmp_path / "twice" / RANK_FILES[1], -2)
    assert RANK_FILES[1] in refused(tmp_path / "twice", VerificationError)


def test_every_file_that_differs_is_a_finding(shards: Path, tmp_path: Path) -> None:
    for name in FILES:
        flip_bit(shards / name, -2)
    with pytest.raises(VerificationError) as caught:
        reshard_shards(shards, tmp_path / "out", 3)
    assert [finding.partition(":")[0] for finding in caught.value.findings] == [
        str(shards / name) for name in FILES
    ]


@pytest.mark.parametrize("name", [*FILES, "adapter_config.json", "lorashard.json"])
def test_a_missing_file_is_named(shards: Path, name: str) -> None:
    (shards / name).unlink()
    said = refused(shards)
    assert str(shards) in said
    assert name in said


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", [1, 100, 10**6])
def test_a_cut_off_file_is_named(shards: Path, name: str, cut: int) -> None:
    content = (shards / name).read_bytes()
    (shards / name).write_bytes(content[: max(0, len(content) - cut)])
    assert name in refused(shards)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_that_ends_while_it_is_read_is_named(
    shards: Path, tmp_path: Path, name: str
) -> None:
    size = (shards / name).stat().st_size

    def cut(_: int) -> None:
        os.truncate(shards / name, size - 1)

    with pytest.raises(ShardError, match=rf"{name}: it ended at byte {size - 1}"):
        reshard_shards(shards, tmp_path / "out", 3, progress=cut)
    assert not (tmp_path / "out").exists()


def test_swapped_rank_files_are_refused(shards: Path) -> None:
    one, two = (shards / name for name in RANK_FILES)
    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)
    assert "was written as" in refused(shards)


@pytest.mark.parametrize("tensors", [per_expert_tensors(seed=1), per_expert_tensors(hidden=16)])
def test_a_rank_file_of_another_adapter_is_refused(
    shards: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    other = save_adapter(tmp_path / "other", tensors)
    split_adapter(other, tmp_path / "other-out", SplitRequest(ep_size=2))
    shutil.copy(tmp_path / "other-out" / RANK_FILES[0], shards / RANK_FILES[0])
    assert RANK_FILES[0] in refused(shards)


def test_an_edited_config_is_refused(shards: Path) -> None:
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    assert "adapter_config.json: BLAKE3 differs" in refused(shards, VerificationError)


EDITS = {
    "scaling": lambda m: m["modules"][MODULE].update(scaling={"gate_proj": 7.0}),
    "absent experts": lambda m: m["modules"][MODULE].update(absent_experts=[1]),
    "ranks of another order": lambda m: m["placement"].update(ranks=[[1, 0], [3, 2]]),
    "layers": lambda m: m["placement"].update(layers={MODULE: [[1, 0], [3, 2]]}),
    "ranks of another size": lambda m: m["placement"].update(ranks=[[0], [1, 2, 3]]),
    "options": lambda m: m["options"].update(num_experts=5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(shards: Path, edit: str) -> None:
    document = json.loads((shards / "lorashard.json").read_text())
    EDITS[edit](document)
    (shards / "lorashard.json").write_text(json.dumps(document))
    refused(shards, ManifestError)


def test_an_adapter_is_no_shard_directory(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    assert "not a finished shard directory" in refused(adapter, ManifestError)


@pytest.mark.parametrize(
    ("ep_size", "expert_map"), [(2, [[0, 1]]), (2, [[0, 1], [2]]), (0, None), (2, {"layers": {}})]
)
def test_a_placement_that_does_not_fit_is_refused(
    shards: Path, tmp_path: Path, ep_size: int, expert_map: Any
) -> None:
    options = Ask(ep_size, expert_map=expert_map).options(tmp_path)
    with pytest.raises(PlacementError):
        reshard_shards(shards, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_target_in_the_way_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for force in (False, True):
        with pytest.raises(ShardError, match="not what lorashard would write"):
            reshard_shards(shards, tmp_path / "out", 3, force=force)
    assert contents(tmp_path / "out") == {"mine": b"x"}


def test_force_replaces_shards_by_what_is_made_of_them(shards: Path, tmp_path: Path) -> None:
    reshard_shards(shards, tmp_path / "wanted", 3)
    with pytest.raises(ShardError, match="`force=True` replaces it"):
        reshard_shards(shards, shards, 3)
    reshard_shards(shards, shards, 3, force=True)
    assert contents(shards) == contents(tmp_path / "wanted")


def test_shards_that_are_damaged_are_not_replaced(shards: Path) -> None:
    flip_bit(shards / FILES[2], -2)
    before = contents(shards)
    with pytest.raises(VerificationError):
        reshard_shards(shards, shards, 3, force=True)
    assert contents(shards) == before


def test_resharding_needs_no_torch(shards: Path) -> None:
    assert imported_by(RUN, "reshard", shards, "--ep-size", 3) & {"torch", "vllm"} == set()


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 5):
        model = scale_layers(MODELS["glm-4.5-air"], layers / MODELS["glm-4.5-air"].num_layers)
        weights = write_adapter(tmp_path / str(layers), model, "fused")
        split_adapter(weights.parent, tmp_path / f"{layers}-ep8", SplitRequest(ep_size=8))
        command = (sys.executable, "-m", "lorashard", "reshard", tmp_path / f"{layers}-ep8")
        done = run_command([*map(str, command), "--ep-size", "4"])
        peaks.append(done.peak_rss_bytes)
        sizes.append(weights.stat().st_size)
    (small, large), grown = peaks, sizes[1] - sizes[0]
    assert grown > 200_000_000
    assert large - small < grown / 20
    assert large < sizes[0]
