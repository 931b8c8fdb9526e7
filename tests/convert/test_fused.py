"""Gate and up as one parameter: joined exactly, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorashard import SplitRequest, convert_shards, split_adapter
from tests.adapters import Spec, build
from tests.conversions import Work, refused
from tests.tiny import MODULE, per_expert_tensors, save_adapter


@pytest.mark.parametrize("half", ["gate_proj", "up_proj"])
def test_the_half_that_is_not_trained_is_zero(tmp_path: Path, half: str) -> None:
    work = Work(tmp_path, build(Spec("L1", projections=(half,)))).split().convert("fused")
    tensors = load_file(work.out / "adapter_model.safetensors")
    b = tensors[f"base_model.model.{MODULE}.lora_B.weight"]
    trained, other = b.chunk(2) if half == "gate_proj" else reversed(b.chunk(2))
    assert trained.all()
    assert not other.any()


def test_whether_up_alone_has_a_gate_is_not_guessed(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L1", gated=False, config={
        "base_model_name_or_path": "some/nemotron-h"
    }))).split()  # fmt: skip
    assert "not known whether the experts have a gate" in refused(work.shards, "fused")


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"up_proj": 9}},
        {"alpha_pattern": {r"experts\.3\.down_proj": 9}},
        {"alpha_pattern": {r"experts\.3\..*": 9}},
    ],
)
def test_scalings_that_differ_cannot_be_fused(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save_adapter(tmp_path / "adapter", **config)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    message = refused(tmp_path / "shards", "fused")
    assert "have the scalings 2, 4.5" in message
    assert "Convert to per_expert" in message
    convert_shards(tmp_path / "shards", tmp_path / "out", "per_expert")


def test_dtypes_that_differ_cannot_be_fused(tmp_path: Path) -> None:
    tensors = {n: t.float() if "gate_proj" in n else t for n, t in per_expert_tensors().items()}
    split_adapter(save_adapter(tmp_path / "adapter", tensors), tmp_path / "shards", SplitRequest(2))
    assert "gate_proj and up_proj are BF16 and F32" in refused(tmp_path / "shards", "fused")


def test_halves_of_two_sizes_cannot_be_fused(tmp_path: Path) -> None:
    tensors = {
        name: tensor[:4].clone() if "gate_proj.lora_B" in name else tensor
        for name, tensor in per_expert_tensors().items()
    }
    split_adapter(save_adapter(tmp_path / "adapter", tensors), tmp_path / "shards", SplitRequest(2))
    assert "differ in size" in refused(tmp_path / "shards", "fused")
