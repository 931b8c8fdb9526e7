"""Every fault is found, and its place named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from lorashard import LayoutOptions, SplitRequest, reshard_shards, split_adapter, verify_shards
from lorashard.errors import (
    AdapterError,
    LorashardError,
    ManifestError,
    ShardError,
    UnsupportedAdapterError,
    VerificationError,
)
from lorashard.shards.directory import read_manifest
from tests.tiny import (
    MODULE,
    RANK_FILES,
    edit_json,
    flip_bit,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_fused,
)

FILES = ("replicated.safetensors", *RANK_FILES)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


@pytest.fixture
def shards(adapter: Path, tmp_path: Path) -> Path:
    split_adapter(adapter, tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def one_finding(shards: Path, **options: Any) -> str:
    (finding,) = verify_shards(shards, **options)
    return finding


def not_compared(source: Path) -> str:
    return f"{source}: not compared, because the shards are damaged already"


def edit_manifest(shards: Path, edit: Callable[[Any], object]) -> None:
    document = unsealed(shards)
    edit(document)
    (shards / "lorashard.json").write_text(json.dumps(document))


def unsealed(shards: Path) -> Any:
    """A manifest without the digest of itself, which would tell of every change."""
    document = json.loads((shards / "lorashard.json").read_text())
    del document["blake3"]
    return document


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_right_shards_have_no_fault(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    adapter = save(tmp_path / "either")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=3))
    assert verify_shards(tmp_path / "shards") == ()
    assert verify_shards(tmp_path / "shards", against=adapter) == ()


def test_progress_adds_up_to_the_bytes_of_all_files(shards: Path) -> None:
    seen: list[int] = []
    verify_shards(shards, progress=seen.append)
    source = read_manifest(shards).source
    data = source.files["adapter_model.safetensors"].size_bytes - len(source.header)
    assert sum(seen) == sum((shards / name).stat().st_size for name in FILES) + data


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_data_is_found(shards: Path, name: str) -> None:
    flip_bit(shards / name, -2)  # the lowest bit of a mantissa
    assert one_finding(shards) == f"{shards / name}: BLAKE3 differs from the manifest's"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_a_header_is_found(shards: Path, name: str) -> None:
    length = 8 + int.from_bytes((shards / name).read_bytes()[:8], "little")
    for position in range(length):
        flip_bit(shards / name, position)
        assert name in one_finding(shards), position
        flip_bit(shards / name, position)
    assert verify_shards(shards) == ()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", [1, 100, 10**6])
def test_a_cut_off_file_is_found(shards: Path, name: str, cut: int) -> None:
    content = (shards / name).read_bytes()
    (shards / name).write_bytes(content[: max(0, len(content) - cut)])
    assert name in one_finding(shards)


def test_swapped_rank_files_are_found(shards: Path) -> None:
    one, two = (shards / name for name in RANK_FILES)
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    assert {finding.partition(":")[0] for finding in verify_shards(shards)} == {str(one), str(two)}


@pytest.mark.parametrize("name", [*FILES, "adapter_config.json"])
def test_a_missing_file_is_found(shards: Path, name: str) -> None:
    (shards / name).unlink()
    assert one_finding(shards) == f"{shards / name}: No such file or directory."


@pytest.mark.parametrize("name", ["notes.txt", "ep-00000-of-00003.safetensors"])
def test_a_file_that_does_not_belong_is_found(shards: Path, name: str) -> None:
    (shards / name).write_text("")
    assert one_finding(shards) == f"{shards / name}: not part of a shard directory"


def test_a_notice_may_be_missing_but_not_be_another_file(shards: Path, adapter: Path) -> None:
    notice = shards / "adapter_model.safetensors"
    shutil.copy(adapter / notice.name, notice)
    expected = f"{notice}: not the notice that belongs in a shard directory"
    assert one_finding(shards) == expected
    (finding,) = verify_shards(shards.as_uri())
    assert finding.endswith(expected.rpartition("/")[2])
    notice.unlink()
    assert verify_shards(shards) == ()


def test_shards_are_not_proven_against_shards(shards: Path) -> None:
    with pytest.raises(AdapterError, match="holds shards, not the adapter") as caught:
        verify_shards(shards, against=shards)
    assert caught.value.hint == "Name the adapter."


@pytest.mark.parametrize("remote", [False, True])
def test_an_adapter_in_several_files_is_said_to_be_one(
    shards: Path, tmp_path: Path, remote: bool
) -> None:
    parts = save_adapter(tmp_path / "parts")
    (parts / "adapter_model.safetensors").unlink()
    tensors = per_expert_tensors()
    for part in range(2):
        some = {name: tensors[name] for name in list(tensors)[part::2]}
        save_file(some, parts / f"adapter_model-{part + 1:05d}-of-00002.safetensors")
    with pytest.raises(UnsupportedAdapterError, match="an adapter in 2 files") as caught:
        verify_shards(shards, against=parts.as_uri() if remote else parts)
    begin = "Download the folder, and join them in it: " if remote else f"Join them: cd {parts} && "
    assert (caught.value.hint or "").startswith(begin)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes"])
def test_what_a_repository_adds_is_no_finding(shards: Path, name: str) -> None:
    (shards / name).write_text("")
    (shards / ".cache").mkdir()
    assert verify_shards(shards) == ()


def test_an_edited_config_is_found(shards: Path) -> None:
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    assert "adapter_config.json: BLAKE3 differs" in one_finding(shards)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_value_that_is_no_number_is_named_with_its_expert(
    tmp_path: Path, value: str, dtype: str
) -> None:
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in per_expert_tensors().items()}
    tensors[f"base_model.model.{MODULE}.3.up_proj.lora_B.weight"][4, 1] = float(value)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    split_adapter(adapter, tmp_path / "out", SplitRequest(ep_size=2))
    finding = one_finding(tmp_path / "out")
    assert finding.startswith(f"{RANK_FILES[1]}: {MODULE}.up_proj.lora_B expert 3 (slot 1)")
    assert verify_shards(tmp_path / "out", against=adapter) == (finding, not_compared(adapter))


def test_a_value_that_is_no_number_is_named_in_a_replicated_tensor(tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name][1, 2] = float("nan")
    split_adapter(save_adapter(tmp_path / "a", tensors), tmp_path / "out", SplitRequest(ep_size=2))
    assert one_finding(tmp_path / "out").startswith(f"replicated.safetensors: {name}: element 10")


def test_an_edited_placement_is_found(shards: Path) -> None:
    edit_manifest(shards, lambda d: d["placement"].update(ranks=[[2, 3], [0, 1]]))
    assert "not the linear placement of 4 experts on 2 ranks" in one_finding(shards)


def test_a_placement_of_another_size_is_found(shards: Path) -> None:
    edit_manifest(
        shards, lambda d: d["placement"].update(strategy="explicit", ranks=[[0], [1, 2, 3]])
    )
    assert any("puts 3 experts on rank 1" in finding for finding in verify_shards(shards))


def test_experts_that_change_places_are_found_against_the_source(
    shards: Path, adapter: Path
) -> None:
    edit_manifest(
        shards, lambda d: d["placement"].update(strategy="explicit", ranks=[[1, 0], [2, 3]])
    )
    findings = verify_shards(shards, against=adapter)
    assert any("expert 1 (slot 0)" in finding for finding in findings)


MODULE_EDITS = {
    "scaling": {"gate_proj": 7.0, "up_proj": 2.0, "down_proj": 2.0},
    "absent_experts": [1],
    "lora_rank": 3,
}


@pytest.mark.parametrize("field", MODULE_EDITS)
def test_an_edited_module_is_found_without_the_source(
    shards: Path, adapter: Path, field: str
) -> None:
    edit_manifest(shards, lambda d: d["modules"][MODULE].update({field: MODULE_EDITS[field]}))
    finding = f"lorashard.json: module {MODULE} is not described as its source has it"
    assert verify_shards(shards) == (finding,)
    assert verify_shards(shards, against=adapter) == (finding, not_compared(adapter))


@pytest.mark.parametrize(
    "other",
    [
        lambda path: save_adapter(path, per_expert_tensors(seed=1)),
        lambda path: save_adapter(path, per_expert_tensors(hidden=16)),
        lambda path: save_adapter(path, per_expert_tensors(layers=2)),
        lambda path: save_adapter(path, lora_alpha=64),
        save_fused,
    ],
    ids=["values", "width", "layers", "alpha", "fused"],
)
def test_another_adapter_is_not_the_source(
    shards: Path, tmp_path: Path, other: Callable[[Path], Path]
) -> None:
    assert verify_shards(shards, against=other(tmp_path / "other"))


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"r": "x", "lora_alpha": []}'])
def test_a_damaged_source_config_is_said_to_be_one(
    shards: Path, adapter: Path, tmp_path: Path, config: str
) -> None:
    shutil.copytree(adapter, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_config.json").write_text(config)
    try:
        assert verify_shards(shards, against=tmp_path / "damaged")
    except LorashardError as err:
        assert err.exit_code in (3, 5)  # noqa: PT017


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"format": "x"}'])
def test_a_damaged_manifest_is_an_error_of_its_own(shards: Path, content: bytes) -> None:
    (shards / "lorashard.json").write_bytes(content)
    with pytest.raises(ManifestError):
        verify_shards(shards)


def test_some_ranks_are_verified_without_the_files_of_the_others(shards: Path) -> None:
    (shards / RANK_FILES[1]).unlink()
    assert verify_shards(shards, ep_ranks=[0]) == ()
    assert any(RANK_FILES[1] in finding for finding in verify_shards(shards, ep_ranks=[1]))
    assert any(RANK_FILES[1] in finding for finding in verify_shards(shards))
    done = run_cli("verify", shards, "--ep-rank", 0)
    assert (done.returncode, done.stdout) == (
        0, f"{shards}: ok, 4 experts on 2 ranks, rank 0 checked\n",
    )  # fmt: skip
    flip_bit(shards / RANK_FILES[0], -1)
    assert run_cli("verify", shards, "--node-ranks", "0-0").returncode == 5


def test_a_file_of_another_rank_that_is_there_is_verified_too(shards: Path) -> None:
    flip_bit(shards / RANK_FILES[1], -1)
    assert len(verify_shards(shards, ep_ranks=[0])) == 1


def test_ranks_that_are_not_there_and_a_source_for_some_ranks_are_refused(
    shards: Path, adapter: Path
) -> None:
    with pytest.raises(ShardError, match="no ep rank 2"):
        verify_shards(shards, ep_ranks=[2])
    with pytest.raises(ShardError, match="all ranks"):
        verify_shards(shards, against=adapter, ep_ranks=[0])


def test_urls_are_verified_like_directories(shards: Path, adapter: Path) -> None:
    assert verify_shards(shards.as_uri(), against=adapter.as_uri()) == ()
    assert verify_shards(shards, against=adapter.as_uri()) == ()
    flip_bit(shards / RANK_FILES[1], -2)
    (finding,) = verify_shards(shards.as_uri())
    assert finding.endswith(f"{RANK_FILES[1]}: BLAKE3 differs from the manifest's")
    assert verify_shards(shards.as_uri(), ep_ranks=[0]) == ()


def test_a_damaged_config_does_not_hide_what_is_wrong_with_the_manifest(shards: Path) -> None:
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    edit_manifest(
        shards, lambda d: d["placement"].update(strategy="explicit", ranks=[[0], [1, 2, 3]])
    )
    findings = verify_shards(shards)
    assert "adapter_config.json: BLAKE3 differs" in findings[0]
    assert any("puts 3 experts on rank 1" in finding for finding in findings)


def split_by_map(
    tmp_path: Path, ranks: list[list[int]], dtype: str | None = None, **layers: list[list[int]]
) -> Path:
    """An explicit placement; `layers` by the layer's number."""
    expert_map = tmp_path / "map.json"
    expert_map.write_text(json.dumps({"ranks": ranks} | ({"layers": layers} if layers else {})))
    request = SplitRequest(ep_size=2, expert_map=expert_map, dtype=dtype)
    adapter = save_adapter(tmp_path / "mapped", per_expert_tensors(layers=2))
    split_adapter(adapter, tmp_path / "explicit", request)
    return tmp_path / "explicit"


def test_a_placement_that_is_not_that_of_the_data_is_found(tmp_path: Path) -> None:
    shards = split_by_map(tmp_path, [[0, 1], [2, 3]])
    assert verify_shards(shards) == ()
    edit_manifest(shards, lambda m: m["placement"].update(ranks=[[1, 0], [2, 3]]))
    assert one_finding(shards).startswith(
        "lorashard.json: with this placement, the shards hold ano"
    )
    assert one_finding(shards, ep_ranks=[1, 0]) == one_finding(shards)
    assert verify_shards(shards, ep_ranks=[1]) == ()
    with pytest.raises(VerificationError, match="with this placement"):
        reshard_shards(shards, tmp_path / "laundered", 1)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_redundant_expert_that_is_another_is_found(tmp_path: Path, dtype: str | None) -> None:
    shards = split_by_map(tmp_path, [[0, 1], [2, 3, 0]], dtype)
    assert verify_shards(shards) == ()
    edit_manifest(shards, lambda m: m["placement"]["ranks"][1].__setitem__(2, 1))
    findings = verify_shards(shards)
    copies, *_ = findings
    assert copies.startswith(f"{RANK_FILES[1]}: what begins at byte ")
    assert copies.endswith(" differs from another copy of the same expert (and 11 more like it)")
    assert sum("another copy" in finding for finding in findings) == 1


def test_an_untrained_expert_that_is_not_zero_is_found(tmp_path: Path) -> None:
    tensors = {name: t for name, t in per_expert_tensors().items() if ".experts.3." not in name}
    adapter = save_adapter(tmp_path / "part", tensors)
    options = LayoutOptions(num_experts=4)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2, options=options))
    shards = tmp_path / "shards"
    assert verify_shards(shards) == ()
    path = shards / RANK_FILES[1]
    content = bytearray(path.read_bytes())
    content[-1] = 0x3F
    path.write_bytes(content)
    edit_manifest(
        shards, lambda m: m["files"][RANK_FILES[1]].update(blake3=blake3(content).hexdigest())
    )
    assert "is not zero, though nothing of the source belongs there" in one_finding(shards)


def test_every_flipped_bit_of_an_explicit_placement_is_noticed(tmp_path: Path) -> None:
    ranks = [[0, 1, 3], [2, 3]]
    layers = {"0": [[3, 2, 1], [1, 0]]}
    shards = split_by_map(tmp_path, ranks, **layers)
    assert verify_shards(shards) == ()
    path = shards / "lorashard.json"
    raw = path.read_bytes()
    begin = raw.index(b'"placement"')
    section = raw[begin : raw.index(b"}", raw.index(b'"layers"', begin)) + 1]
    passed = []
    for position, bit in itertools.product(range(len(section)), range(8)):
        changed = bytearray(raw)
        changed[begin + position] ^= 1 << bit
        path.write_bytes(changed)
        try:
            findings = verify_shards(shards)
        except ManifestError:
            continue
        if not findings and json.loads(changed) != json.loads(raw):
            passed.append(bytes(changed[begin + position - 10 : begin + position + 10]))
    assert passed == []


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a document that is neither an object nor a list."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))
    else:
        yield path


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 2
    return "x" if value is None else value + "x"


FREE_LEAVES = {("lorashard_version",), ("source", "repo"), ("source", "revision")}


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_every_changed_leaf_of_the_manifest_is_noticed(
    tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    shards = tmp_path / "shards"
    split_adapter(save(tmp_path / "adapter"), shards, SplitRequest(ep_size=2))
    content = json.dumps(unsealed(shards))
    passed = set()
    for path in leaves(json.loads(content)):
        document = json.loads(content)
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = changed(place[path[-1]])
        (shards / "lorashard.json").write_text(json.dumps(document))
        try:
            if not verify_shards(shards):
                passed.add(path)
        except ManifestError:
            continue
    assert passed == FREE_LEAVES


@pytest.mark.parametrize("leaf", FREE_LEAVES)
def test_what_only_the_seal_proves_is_proven_by_it(
    shards: Path, adapter: Path, leaf: tuple[str, ...]
) -> None:
    path = shards / "lorashard.json"
    name = json.dumps(leaf[-1])
    begin = path.read_text().index(f"{name}: ") + len(name) + 2
    content = path.read_text()
    end = content.index(",", begin)
    path.write_text(f'{content[:begin]}"another"{content[end:]}')
    assert one_finding(shards) == (
        "lorashard.json: it was changed since it was written, as the BLAKE3 in its last field shows"
    )
    assert verify_shards(shards, against=adapter)[0] == one_finding(shards)


def test_a_manifest_without_a_seal_is_taken_as_it_is(shards: Path) -> None:
    edit_manifest(shards, lambda _: None)
    assert verify_shards(shards) == ()


def test_another_adapter_is_one_finding_with_the_first_difference(tmp_path: Path) -> None:
    right, wrong = (
        save_adapter(tmp_path / str(seed), per_expert_tensors(seed, layers=3)) for seed in (0, 1)
    )
    shards = tmp_path / "shards"
    split_adapter(right, shards, SplitRequest(ep_size=2))
    assert verify_shards(shards, against=right) == ()
    finding = one_finding(shards, against=wrong)
    assert finding.startswith(
        f"{wrong}: not the adapter that the shards were split from, as its BLAKE3 shows. The first "
        "difference is: "
    )
    assert ".safetensors: " in finding


def test_a_source_that_was_saved_again_with_the_same_values_is_proven(tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    split_adapter(save_adapter(tmp_path / "a", tensors), tmp_path / "out", SplitRequest(ep_size=2))
    again = save_adapter(tmp_path / "again", tensors)
    save_file(tensors, again / "adapter_model.safetensors", {"format": "pt", "step": "9"})
    assert verify_shards(tmp_path / "out", against=again) == ()


def test_every_difference_from_the_source_itself_is_found(shards: Path, adapter: Path) -> None:
    edit_manifest(
        shards, lambda d: d["placement"].update(strategy="explicit", ranks=[[1, 0], [3, 2]])
    )
    assert len(verify_shards(shards, against=adapter)) > 1
