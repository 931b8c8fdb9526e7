"""Which parameters fused pairs are for, and which way round: decided by shapes, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters import NON_GATED_LAYOUTS, Adapter
from tests.layouts import EXPERTS, built, module_of, refusal
from tests.strategies import layout_of


def with_tensor(adapter: Adapter, name: str, *shape: int, dtype: Any = torch.float32) -> Adapter:
    adapter.tensors[name] = torch.zeros(shape, dtype=dtype)
    return adapter


@pytest.mark.parametrize("layout", NON_GATED_LAYOUTS)
def test_experts_without_a_gate_have_up_and_down(layout: str):
    module = module_of(built(layout, gated=False), gate_up="none")
    assert [stack.projection for stack in module.stacks[::2]] == ["up_proj", "down_proj"]
    assert module.gate_up == "none"


@pytest.mark.parametrize(("hidden", "intermediate"), [(6, 3), (4, 4), (4, 8)])
@pytest.mark.parametrize("layout", ["L2", "L3", "L5", "L6", "L7"])
def test_the_pair_decides_where_one_tensor_is_ambiguous(layout, hidden, intermediate):
    module = module_of(built(layout, hidden=hidden, intermediate=intermediate))
    sizes = {(s.projection, s.matrix): (s.rows, s.cols) for s in module.stacks}
    assert sizes["gate_up_proj", "lora_B"] == (2 * intermediate, 2)
    assert sizes["down_proj", "lora_A"] == (2, intermediate)


@pytest.mark.parametrize(
    ("base_model", "expected"),
    [("openai/gpt-oss-20b", "interleaved"), ("tiny/moe", "concatenated")],
)
def test_the_order_of_gate_and_up_rows_follows_from_the_base_model(base_model, expected):
    adapter = built("L2", config={"base_model_name_or_path": base_model})
    assert module_of(adapter).gate_up == expected


def test_an_unnamed_base_model_is_told_as_not_known():
    adapter = built("L2", config={"base_model_name_or_path": None})
    assert not layout_of(adapter).gate_up_known


@pytest.mark.parametrize("base_model", ["/ckpt/global_step_400/huggingface", "/ckpt/gpt-oss"])
def test_a_local_path_is_no_evidence_of_the_order(base_model):
    adapter = built("L2", config={"base_model_name_or_path": base_model})
    assert not layout_of(adapter).gate_up_known
    assert module_of(adapter).gate_up == "concatenated"


def test_fused_rows_that_are_no_multiple_of_r_are_refused():
    assert "not a multiple of r=3" in refusal(built("L2", config={"r": 3}))


@pytest.mark.parametrize("layout", ["L4-gate_up", "L4-down"])
def test_a_single_fused_pair_is_ambiguous_without_the_hidden_size(layout: str):
    assert "more than one way" in refusal(built(layout), orientation=None)


@pytest.mark.parametrize("layout", ["L4-gate_up", "L4-down"])
def test_the_hidden_size_tells_what_a_single_fused_pair_is(layout: str):
    adapter = built(layout)
    (name,) = adapter.config["target_parameters"]
    stack = module_of(adapter, orientation=None, hidden_size=6).stacks[0]
    assert stack.projection == name.rpartition(".")[2]


@pytest.mark.parametrize("projection", ["down_proj", "gate_up_proj"])
def test_parameters_of_this_layer_in_the_config_count_before_those_of_others(projection: str):
    (other,) = {"down_proj", "gate_up_proj"} - {projection}
    targets = [f"layers.0.mlp.experts.{projection}", f"layers.1.mlp.experts.{other}"]
    adapter = built("L4-down", config={"target_parameters": targets})
    assert module_of(adapter).stacks[0].projection == projection


def test_the_attention_tells_the_hidden_size():
    assert module_of(built("L4-down", extras=True), orientation=None).stacks[0].cols == 5


def test_a_pair_without_gate_is_ambiguous_without_the_hidden_size():
    assert "more than one way" in refusal(built("L2", gated=False), orientation=None)


def test_a_model_of_other_sizes_is_refused():
    assert "contradicts hidden size 7" in refusal(built("L2"), hidden_size=7)


def test_a_forced_orientation_that_does_not_fit_is_refused():
    assert "contradicts" in refusal(built("L2"), orientation="transposed")


def test_shapes_of_no_fused_parameters_are_refused():
    adapter = with_tensor(built("L2"), f"{EXPERTS}.lora_B.weight", 7, 8)
    assert "fit no gate_up" in refusal(adapter)


def test_a_fused_lora_b_of_an_unknown_writer_is_refused():
    assert "`lora_b_layout`" in refusal(built("L2", peft_version=None))


def test_a_lora_b_layout_that_contradicts_the_adapter_is_refused():
    assert "Leave the option out" in refusal(built("L6"), lora_b_layout="rank_major")


def test_a_fused_pair_without_features_is_refused():
    adapter = with_tensor(built("L4-down"), f"{EXPERTS}.lora_B.weight", 0, 8)
    assert "at least one row and column" in refusal(adapter)
