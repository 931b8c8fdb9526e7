"""A pair for each expert, with its own r and scaling, under the names that transformers 4 has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorashard.convert.peft_tensors import TrainedModule
from lorashard.convert.per_expert import build_per_expert_modules
from tests.adapters import Adapter, Spec, build
from tests.conversions import Work, peft_target
from tests.layouts import built, module_of
from tests.tiny import MODULE


def test_mixtral_s_experts_are_called_as_mixtral_s(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L2")), "mixtral").split().convert("per_expert")
    names = load_file(work.out / "adapter_model.safetensors")
    block = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert {f"{block}.3.{leaf}.lora_A.weight" for leaf in ("w1", "w2", "w3")} <= set(names)


def per_expert_modules(adapter: Adapter, **target: Any) -> dict[str, TrainedModule]:
    modules = build_per_expert_modules(
        module_of(adapter), adapter.spec.num_experts, peft_target("per_expert", **target)
    )
    return {module.name.removeprefix(f"{MODULE}."): module for module in modules}


@pytest.mark.parametrize(
    ("gate_up", "rows"),
    [
        ("concatenated", (range(5), range(5, 10))),
        ("interleaved", (range(0, 10, 2), range(1, 10, 2))),
    ],
)
def test_gate_and_up_get_their_rows_of_lora_b_and_the_one_lora_a(
    gate_up: str, rows: tuple[range, range]
) -> None:
    modules = per_expert_modules(built("L2"), gate_up=gate_up)
    for projection, expected in zip(("gate_proj", "up_proj"), rows, strict=True):
        lora_a, lora_b = modules[f"3.{projection}"].tensors
        assert (lora_a.shape, lora_b.shape) == ((2, 6), (5, 2))
        assert lora_a.factor.parts[0].stack.name == f"{MODULE}.gate_up_proj.lora_A"
        assert lora_b.factor.parts[0].stack_rows == expected


def test_each_expert_keeps_its_r_and_scaling() -> None:
    modules = per_expert_modules(built(lora_ranks={1: 4}))
    assert (modules["1.up_proj"].lora_rank, modules["1.up_proj"].scaling) == (4, 1.0)
    assert (modules["2.up_proj"].lora_rank, modules["2.up_proj"].scaling) == (2, 2.0)
    lora_a, lora_b = modules["2.up_proj"].tensors
    assert lora_a.factor.parts[0].rows == lora_b.factor.parts[0].cols == range(2)


def test_an_expert_that_is_not_trained_is_zero() -> None:
    untrained = per_expert_modules(built(experts=(0, 2)))["1.down_proj"]
    assert untrained.scaling is None
    assert [tensor.factor.parts for tensor in untrained.tensors] == [(), ()]
    assert [tensor.shape for tensor in untrained.tensors] == [(2, 5), (6, 2)]


@pytest.mark.parametrize(
    ("adapter", "model_names", "name"),
    [
        (built("L10"), "qwen3_moe", f"{MODULE}.0.gate_proj"),
        (built("L10"), "Mixtral", "model.layers.0.block_sparse_moe.experts.0.w1"),
        (built("L1"), "mixtral", f"{MODULE}.0.gate_proj"),
        (built("L1-w"), "", "model.layers.0.block_sparse_moe.experts.0.w1"),
    ],
    ids=["other", "mixtral", "has-its-names", "has-w-names"],
)
def test_experts_have_the_names_of_transformers_4(
    adapter: Adapter, model_names: str, name: str
) -> None:
    target = peft_target("per_expert", model_names=model_names)
    assert next(iter(build_per_expert_modules(module_of(adapter), 4, target))).name == name
