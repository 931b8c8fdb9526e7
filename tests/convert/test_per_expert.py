"""A pair for each expert, with its own r and scaling, under the names that transformers 4 has."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.adapters import Spec, build
from tests.conversions import Work


def test_mixtral_s_experts_are_called_as_mixtral_s(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L2")), "mixtral").split().convert("per_expert")
    names = load_file(work.out / "adapter_model.safetensors")
    block = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert {f"{block}.3.{leaf}.lora_A.weight" for leaf in ("w1", "w2", "w3")} <= set(names)
