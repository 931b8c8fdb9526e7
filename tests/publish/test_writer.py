"""However the ranks share an adapter, together they write what `split` writes of it, byte for byte."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorashard import LayoutOptions, SplitRequest, split_adapter, verify_shards
from lorashard.errors import LayoutError, LorashardError, OutputExistsError
from lorashard.publish.exchange import Exchange
from lorashard.publish.rounds import OwnShare
from lorashard.publish.writer import AdapterWriter, make_and_commit
from lorashard.shards.manifest import Manifest
from lorashard.storage.staging import staged_directory
from tests.adapters import ONE_TENSOR_PER_EXPERT, Spec, build

EXPERTS = "model.layers.{}.mlp.experts"


def files_of(path: Path) -> dict[str, bytes]:
    return {child.name: child.read_bytes() for child in path.iterdir()}


def gathered(tmp_path: Path, **changes: Any) -> Path:
    """A plain adapter as PEFT would save it, with attention beside the experts."""
    given: dict[str, Any] = {
        "layout": "L1", "num_experts": 6, "num_layers": 2, "dtype": torch.bfloat16, "fill": "random",
        "extras": True,
    }  # fmt: skip
    path = build(Spec(**given | changes)).write(tmp_path / "gathered")
    config = json.loads((path / "adapter_config.json").read_text())
    text = json.dumps(config, indent=2, sort_keys=True)
    (path / "adapter_config.json").write_text(text)
    weights = path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    return path


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def commit_all(writers: Sequence[AdapterWriter]) -> list[Any]:
    """The manifest or the error of each rank."""
    barrier = threading.Barrier(len(writers), timeout=60)

    def commit(writer: AdapterWriter) -> Any:
        try:
            return writer.commit(barrier.wait)
        except Exception as err:  # noqa: BLE001 - the answer
            return err

    with ThreadPoolExecutor(len(writers)) as threads:
        return list(threads.map(commit, writers))


def writers_of(path: Path, out: Path, world: int, **options: Any) -> list[AdapterWriter]:
    settings: dict[str, Any] = {"ep_size": 2} | options
    return [
        AdapterWriter(out, config_of(path), rank=rank, world_size=world, **settings)
        for rank in range(world)
    ]


@settings(deadline=None)
@given(st.data())
def test_ranks_that_share_tensors_in_any_way_write_what_split_writes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    num_experts = data.draw(st.integers(1, 7))
    path = gathered(
        tmp_path,
        layout=data.draw(st.sampled_from([*ONE_TENSOR_PER_EXPERT, "L2", "L3", "L8"])),
        num_experts=num_experts,
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
    )
    world = data.draw(st.integers(1, 8))
    options = LayoutOptions(num_experts=num_experts, hidden_size=6, intermediate_size=5)
    request = SplitRequest(
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from(["linear", "round_robin"])),
        options=options,
    )
    writers = writers_of(
        path, tmp_path / "out", world,
        ep_size=request.ep_size, strategy=request.strategy, options=options,
    )  # fmt: skip
    cuts_allowed = data.draw(st.booleans())
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        how = data.draw(
            st.sampled_from(["one", "copies", "parts"] if cuts_allowed else ["one", "copies"])
        )
        owner = data.draw(st.integers(0, world - 1))
        if how == "copies":
            for writer in writers[owner:]:
                writer.tensor(name, tensor, is_copy=True)
        elif how == "parts":
            is_fused = ".experts.base_layer" in name or ".experts.lora" in name
            axis = 0 if is_fused else data.draw(st.integers(0, tensor.dim() - 1))
            at, size = 0, tensor.shape[axis]
            whole = 2 if is_fused and "lora_A" in name else 1  # an expert's r rows
            order = data.draw(st.permutations(writers))
            for rank, writer in enumerate(order):
                end = (
                    size if rank == world - 1 else data.draw(st.integers(at, size)) // whole * whole
                )
                end = max(at, end)
                writer.tensor(
                    name, tensor.narrow(axis, at, end - at), axis=axis, begin=at, size=size
                )
                at = end
        else:
            writers[owner].tensor(name, tensor)
    made = commit_all(writers)
    split_adapter(path, tmp_path / "split", request)
    assert not [one for one in made if isinstance(one, Exception)]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "split")
    assert all(one == made[0] for one in made)


def own_experts(
    path: Path, writer: AdapterWriter, ids: Sequence[int], layers: Sequence[int] = (0, 1)
) -> None:
    """Give a writer some experts as a trainer has them, stacked."""
    tensors = load_file(path / "adapter_model.safetensors")
    for layer in layers:
        module = EXPERTS.format(layer)
        factors = {}
        for projection in ("gate_proj", "up_proj", "down_proj"):
            names = [f"base_model.model.{module}.{i}.{projection}" for i in ids]
            factors[projection] = (
                torch.stack([tensors[f"{name}.lora_A.weight"] for name in names]),
                torch.stack([tensors[f"{name}.lora_B.weight"] for name in names]),
            )
        writer.experts(module, ids, factors)


def own_rest(path: Path, writer: AdapterWriter) -> None:
    """Give a writer what is no expert."""
    tensors = load_file(path / "adapter_model.safetensors")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            continue
        module, _, kind = name.rpartition(".lora_")
        if module:
            pairs.setdefault(module, {})[kind] = tensor
        else:
            writer.tensor(name, tensor)
    for module, pair in pairs.items():
        writer.dense(module.removeprefix("base_model.model."), pair["A.weight"], pair["B.weight"])


def dealt(path: Path, out: Path, *ids: Sequence[int], **options: Any) -> list[AdapterWriter]:
    """A writer for each rank, with the experts of these numbers; the first has the rest as well."""
    writers = writers_of(path, out, len(ids), **options)
    for writer, own in zip(writers, ids):
        own_experts(path, writer, own)
    own_rest(path, writers[0])
    return writers


@pytest.mark.parametrize(
    "ids", [([0, 1, 2], [3, 4, 5]), ([5, 0], [], [2, 4, 1, 3]), ([*range(6)],)]
)
def test_stacked_experts_and_dense_layers(tmp_path: Path, ids: tuple[list[int], ...]) -> None:
    path = gathered(tmp_path)
    with_experts = tuple(own for own in ids if own)
    made = commit_all(dealt(path, tmp_path / "out", *with_experts, ep_size=4))
    manifest = split_adapter(path, tmp_path / "split", SplitRequest(4))
    assert made == [manifest] * len(with_experts)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "split")
    verify_shards(tmp_path / "out", against=path)


def test_each_rank_knows_what_its_rounds_took(tmp_path: Path) -> None:
    writers = dealt(gathered(tmp_path), tmp_path / "out", [0, 1, 2], [3, 4, 5])
    assert not writers[0].seconds
    commit_all(writers)
    for writer in writers:
        seconds = dict(writer.seconds)
        total = seconds.pop("total")
        assert list(seconds) == ["describe", "write", "digest", "manifest", "finish"]
        assert 0 < sum(seconds.values()) <= total


def test_experts_of_a_smaller_r_are_padded_as_split_does(tmp_path: Path) -> None:
    path = gathered(tmp_path, lora_ranks={1: 1, 4: 1})
    writers = writers_of(path, tmp_path / "out", 2)
    for number, (name, tensor) in enumerate(load_file(path / "adapter_model.safetensors").items()):
        writers[number % 2].tensor(name, tensor)
    commit_all(writers)
    split_adapter(path, tmp_path / "split", SplitRequest(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "split")


def test_a_tensor_that_is_cut_where_it_has_to_stay_together_is_refused_by_name(
    tmp_path: Path,
) -> None:
    path = gathered(tmp_path, layout="L2")
    writers = writers_of(path, tmp_path / "out", 2, options=LayoutOptions(num_experts=6))
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        half = tensor.shape[-1] // 2
        for writer, begin, end in zip(writers, (0, half), (half, tensor.shape[-1])):
            part = tensor.narrow(-1, begin, end - begin)
            writer.tensor(name, part, axis=tensor.dim() - 1, begin=begin, size=tensor.shape[-1])
    errors = commit_all(writers)
    assert ".experts." in str(errors[0])
    assert "cut inside what has to stay together" in str(errors[0])
    assert leftovers(tmp_path) == {"gathered"}


def leftovers(folder: Path) -> set[str]:
    return {child.name for child in folder.iterdir()}


def test_what_two_ranks_have_is_refused_by_name_on_both(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    writers = dealt(path, tmp_path / "out", [0, 1, 2, 3], [3, 4, 5])
    errors = commit_all(writers)
    for error in errors:
        assert isinstance(error, LayoutError)
        assert "mlp.experts.3." in str(error)
        assert "ranks 0 and 1 both have index 0" in str(error)
    assert leftovers(tmp_path) == {"gathered"}


@pytest.mark.parametrize(("own", "missing"), [(([0, 1], [3, 4, 5]), 2), (([0], [1, 2, 3, 4]), 5)])
def test_an_expert_that_no_rank_has_is_refused_by_number(
    tmp_path: Path, own: tuple[list[int], ...], missing: int
) -> None:
    path = gathered(tmp_path)
    writers = dealt(path, tmp_path / "out", *own, options=LayoutOptions(num_experts=6))
    for error in commit_all(writers):
        assert isinstance(error, LayoutError)
        assert f"of expert {missing} (1 of 6)" in str(error)
    assert leftovers(tmp_path) == {"gathered"}


def test_rows_that_no_rank_has_are_refused_by_name(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    writers = writers_of(path, tmp_path / "out", 2)
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        writers[0].tensor(name, tensor[:1], size=len(tensor))
    error, _ = commit_all(writers)
    assert "no rank has index 1 of axis 0" in str(error)


def test_ranks_with_different_configurations_are_refused(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    one = AdapterWriter(tmp_path / "out", config_of(path), ep_size=2, world_size=2)
    other = config_of(path) | {"lora_alpha": 99}
    two = AdapterWriter(tmp_path / "out", other, ep_size=2, rank=1, world_size=2)
    for error in commit_all([one, two]):
        assert "different LoRA configurations" in str(error)
    assert leftovers(tmp_path) == {"gathered"}


def test_stacks_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    writer = AdapterWriter(tmp_path / "out", {"r": 2, "lora_alpha": 2}, ep_size=2)
    with pytest.raises(LayoutError, match=r"gate_proj is \[2, 2, 6\] for 3 experts"):
        writer.experts(
            EXPERTS.format(0),
            [0, 1, 2],
            {"gate_proj": (torch.zeros(2, 2, 6), torch.zeros(2, 5, 2))},
        )


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["describe", "write", "digest", "describe_all", "finish"])
def test_a_rank_that_fails_in_any_round_leaves_nothing_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failing: int
) -> None:
    path = gathered(tmp_path)
    original = getattr(OwnShare, where)

    def fail(self: OwnShare, *arguments: Any) -> Any:
        if self._rank == failing:
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OwnShare, where, fail)
        errors = commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
    published = (failing, where) in ((1, "finish"), (1, "describe_all"))
    if published:  # rank 0 does not need rank 1 any more
        assert isinstance(errors[0], Manifest)
    else:
        assert all(isinstance(error, Exception) for error in errors)
        assert leftovers(tmp_path) == {"gathered"}
        assert "no space left while writing out" in str(errors[failing])
        made = commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
        assert isinstance(made[1], Manifest)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_make_its_writer_lets_nobody_wait(tmp_path: Path, failing: int) -> None:
    path, barrier = gathered(tmp_path), threading.Barrier(2, timeout=60)

    def publish(rank: int, expert_map: Path | None) -> Any:
        def make() -> AdapterWriter:
            return AdapterWriter(
                tmp_path / "out",
                config_of(path),
                ep_size=2,
                expert_map=expert_map,
                rank=rank,
                world_size=2,
            )

        try:
            return make_and_commit(make, tmp_path / "out", rank, 2, barrier.wait)
        except LorashardError as err:
            return err

    maps = [tmp_path / "nowhere.json" if rank == failing else None for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        errors = list(threads.map(publish, range(2), maps))
    assert "nowhere.json" in str(errors[failing])
    other = str(errors[1 - failing])
    assert "rank 0 has not begun" in other if failing == 0 else "nowhere.json" in other
    assert leftovers(tmp_path) == {"gathered"}


def test_a_target_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    split_adapter(path, tmp_path / "out", SplitRequest(3))
    before = files_of(tmp_path / "out")
    errors = commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
    assert isinstance(errors[0], OutputExistsError)
    assert "rank 0 has not begun" in str(errors[1])
    assert files_of(tmp_path / "out") == before
    commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5], force=True))
    split_adapter(path, tmp_path / "split", SplitRequest(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "split")


def test_what_a_killed_run_has_left_is_cleared(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    staging = tmp_path / ".out.lorashard-partial"
    staging.mkdir()
    for name in (".session", ".rank-0-parts.json", "ep-00000-of-00002.safetensors"):
        (staging / name).write_bytes(b"{}" * 10000)
    commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
    split_adapter(path, tmp_path / "split", SplitRequest(2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "split")


def test_another_job_on_the_same_target_is_left_alone(tmp_path: Path) -> None:
    path = gathered(tmp_path)
    with staged_directory(
        tmp_path / "out", last="lorashard.json", force=False, replaceable=lambda *_: False
    ) as staging:
        (staging / ".session").write_bytes(b"")
        errors = commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
        assert leftovers(staging) == {".session"}
    assert "another lorashard is writing it" in str(errors[0])
    assert "rank 0 has not begun" in str(errors[1])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_read_what_another_said_does_not_let_it_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path = gathered(tmp_path)
    original = Exchange._read

    def fail(self: Exchange, name: str, rank: int) -> Any:
        if self._rank == failing and name == "write":
            raise OSError(5, "Input/output error")
        return original(self, name, rank)

    monkeypatch.setattr(Exchange, "_read", fail)
    monkeypatch.setattr("lorashard.publish.exchange._SEEN_WITHIN_S", 1.0)
    errors = commit_all(dealt(path, tmp_path / "out", [0, 1, 2], [3, 4, 5]))
    assert "Input/output error" in str(errors[failing])
    assert isinstance(errors[1 - failing], LorashardError)
    assert leftovers(tmp_path) == {"gathered"}
