"""What a cast loses of some values is told, with the number of them and a place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashard import SplitRequest, verify_shards
from lorashard.split.run import run_split
from tests.tiny import (
    FUSED_CONFIG,
    fused_tensors,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_fused,
)

INFINITE, NAN = float("inf"), float("nan")
TO_F16 = SplitRequest(ep_size=2, dtype="float16")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """7 values that float16 has not, 5 of them in one tensor, one in a replicated tensor."""
    tensors = {name: tensor.float() for name, tensor in per_expert_tensors().items()}
    (expert, other, replicated) = places(tensors)
    tensors[expert].view(-1)[:5] = 1e-12
    tensors[other].view(-1)[3] = -1e-12
    tensors[replicated].view(-1)[0] = 1e-30
    return save_adapter(tmp_path / "adapter", tensors)


def places(tensors) -> tuple[str, str, str]:
    experts = [name for name in tensors if ".experts." in name]
    return experts[-1], experts[0], next(name for name in tensors if ".experts." not in name)


def test_values_that_become_zero_are_counted(adapter: Path, tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    total = sum(tensor.numel() for tensor in tensors.values())
    expected = (
        f"7 of {total} values became 0 in the cast to F16; {places(tensors)[0]} has the most."
    )
    told: list[str] = []
    result = run_split(adapter, tmp_path / "out", TO_F16, note=told.append)
    assert told[-1] == expected
    assert result.notes[-1] == expected
    assert verify_shards(tmp_path / "out", against=adapter) == ()


def test_the_command_says_it_on_stderr_and_in_json(adapter: Path, tmp_path: Path) -> None:
    done = run_cli(
        "split", adapter, "--ep-size", 2, "--dtype", "float16", "-o", tmp_path / "out", "--json"
    )
    (note,) = (n for n in json.loads(done.stdout)["notes"] if "became 0" in n)
    assert f"note: {note}\n" in done.stderr


def test_values_that_are_no_numbers_are_counted_apart(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in per_expert_tensors().items()}
    (expert, other, _) = places(tensors)
    tensors[other].view(-1)[:3] = INFINITE
    tensors[expert].view(-1)[0] = NAN
    adapter = save_adapter(tmp_path / "adapter", tensors)
    total = sum(tensor.numel() for tensor in tensors.values())
    notes = run_split(adapter, tmp_path / "out", TO_F16).notes
    assert notes[-1] == (
        f"4 of {total} values that were cast are infinite or NaN, in the adapter too; "
        f"{other} has the most."
    )
    assert not any("became 0" in note for note in notes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_a_cast_that_loses_nothing_adds_no_note(tmp_path: Path, dtype, save) -> None:
    adapter = save(tmp_path / "adapter")
    before = run_split(adapter, tmp_path / "out", SplitRequest(2, dtype=dtype), dry_run=True).notes
    assert run_split(adapter, tmp_path / "out", SplitRequest(2, dtype=dtype)).notes == before


def test_values_of_a_fused_tensor_are_counted_in_every_expert(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in fused_tensors().items()}
    name = next(name for name in tensors if name.endswith("experts.base_layer.lora_A.weight"))
    tensors[name][:, 0] = 1e-12
    adapter = save_adapter(tmp_path / "adapter", tensors, **FUSED_CONFIG)
    (note,) = (n for n in run_split(adapter, tmp_path / "out", TO_F16).notes if "became 0" in n)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert note == (
        f"{len(tensors[name])} of {total} values became 0 in the cast to F16; {name} has the most."
    )
