"""Gate and up as one parameter: joined exactly, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorashard import SplitRequest, convert_shards, split_adapter
from lorashard.convert.fused import build_fused_modules
from lorashard.convert.peft_tensors import OutputTensor, TrainedModule
from lorashard.errors import LayoutError
from tests.adapters import Spec, build
from tests.conversions import Work, peft_target, refused
from tests.layouts import built, module_of
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


def test_halves_of_two_sizes_cannot_be_fused() -> None:
    module = module_of(built("L10"))
    stacks = tuple(
        replace(stack, rows=4)
        if (stack.projection, stack.matrix) == ("gate_proj", "lora_B")
        else stack
        for stack in module.stacks
    )
    with pytest.raises(LayoutError, match="gate_proj and up_proj differ in size"):
        tuple(build_fused_modules(replace(module, stacks=stacks), 4, peft_target()))


def tensors_by_matrix(module: TrainedModule) -> dict[str, OutputTensor]:
    return {tensor.name.split(".")[-2]: tensor for tensor in module.tensors}


def test_gate_and_up_are_stacked_in_lora_a_and_block_diagonal_in_lora_b() -> None:
    gate_up, down = build_fused_modules(module_of(built("L10")), 4, peft_target())
    assert (gate_up.name, gate_up.lora_rank, gate_up.scaling) == (f"{MODULE}.gate_up_proj", 4, 2.0)
    pair = tensors_by_matrix(gate_up)
    assert pair["lora_A"].name == f"base_model.model.{MODULE}.base_layer.lora_A.weight"
    assert (pair["lora_A"].shape, pair["lora_A"].axes) == ((4 * 4, 6), "erc")
    assert (pair["lora_B"].shape, pair["lora_B"].axes) == ((2 * 5, 4 * 4), "rce")
    assert [part.rows for part in pair["lora_A"].factor.parts] == [range(2), range(2, 4)]
    parts = [(part.rows, part.cols) for part in pair["lora_B"].factor.parts]
    assert parts == [(range(5), range(2)), (range(5, 10), range(2, 4))]
    assert down.tensors[0].name == f"base_model.model.{MODULE}.lora_A.weight"


def test_equal_inputs_keep_their_r() -> None:
    target = peft_target(modules_with_equal_inputs=frozenset({MODULE}))
    gate_up, _ = build_fused_modules(module_of(built("L10")), 4, target)
    pair = tensors_by_matrix(gate_up)
    assert gate_up.lora_rank == 2
    assert [part.stack.projection for part in pair["lora_A"].factor.parts] == ["gate_proj"]
    assert [part.cols for part in pair["lora_B"].factor.parts] == [range(2), range(2)]


def test_interleaved_rows_of_lora_b_alternate() -> None:
    gate_up, _ = build_fused_modules(module_of(built("L10")), 4, peft_target(gate_up="interleaved"))
    parts = tensors_by_matrix(gate_up)["lora_B"].factor.parts
    assert [part.rows for part in parts] == [range(0, 10, 2), range(1, 10, 2)]


def test_a_transposed_pair_has_each_factor_in_the_other_s_place() -> None:
    target = peft_target(orientation="transposed")
    gate_up, _ = build_fused_modules(module_of(built("L14")), 4, target)
    pair = tensors_by_matrix(gate_up)
    assert (pair["lora_A"].shape, pair["lora_A"].axes) == ((4 * 2, 2 * 5), "ecr")
    assert (pair["lora_B"].shape, pair["lora_B"].axes) == ((6, 4 * 2), "cre")


def test_experts_that_are_not_trained_do_not_count_as_another_scaling() -> None:
    module = module_of(built(experts=(0, 2), lora_ranks={2: 4}, config={"alpha_pattern": {
        r"experts\.2\..*": 8}}))  # fmt: skip
    assert {m.scaling for m in build_fused_modules(module, 4, peft_target())} == {2.0}
