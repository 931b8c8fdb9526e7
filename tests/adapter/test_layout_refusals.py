"""What is said where an adapter cannot be read, in full; and what decides at the edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lorashard.errors import LayoutError, LorashardError
from lorashard.rules import UNSUPPORTED_VARIANTS
from tests.adapters import Adapter, Spec, build
from tests.layouts import ATTENTION, EXPERTS, built, module_of, refusal
from tests.strategies import layout_of

BLOCK = "base_model.model.model.layers.0"
R, H, I = 2, 6, 5  # noqa: E741 - as `Spec` has them


def with_tensors(adapter: Adapter, **shapes: tuple[int, ...]) -> Adapter:
    for name, shape in shapes.items():
        adapter.tensors[name] = torch.zeros(shape)
    return adapter


def with_pair(adapter: Adapter, module: str, inside: int, out: int, r: int = R) -> Adapter:
    shapes = {f"{module}.lora_A.weight": (r, inside), f"{module}.lora_B.weight": (out, r)}
    return with_tensors(adapter, **shapes)


def with_another_layer(adapter: Adapter, num_experts: int, layer: int = 1) -> Adapter:
    other = build(Spec("L10", num_experts=num_experts)).tensors
    more = {name.replace("layers.0", f"layers.{layer}"): tensor for name, tensor in other.items()}
    adapter.tensors.update(more)
    return adapter


@dataclass(frozen=True)
class Case:
    """An adapter that is refused, and with which words."""

    make: Callable[[], Adapter]
    message: str
    hint: str
    options: dict[str, Any] = field(default_factory=dict)


ANOTHER_R = "has r={r}, adapter_config.json says 2."
UNKNOWN_LAYOUT = (
    "Either it holds several experts in a layout that lorashard does not know, or the config does not "
    "belong to this file."
)
OTHER_CONFIG = "Does adapter_config.json belong to this file (r, rank_pattern)?"
HOW_MANY = "Give `model=MODEL_DIR` or `num_experts=N`."
UNCOUNTED: dict[str, Any] = {"num_experts": None}
CASES = {
    "not gathered": Case(
        lambda: with_tensors(built(), **{f"{ATTENTION}.lora_A.weight": (0,)}),
        f"adapter: tensor {ATTENTION}.lora_A.weight is empty, shape [0].",
        "DeepSpeed ZeRO-3 leaves such tensors where the parameters were not gathered before saving. Save "
        "again with all parameters gathered, for example with stage3_gather_16bit_weights_on_model_save.",
    ),
    "control characters": Case(
        lambda: with_tensors(built(), **{"a\nb.lora_A.weight": (2, 6)}),
        "adapter: the name of tensor 'a\\nb.lora_A.weight' has control characters.",
        "The file is damaged; save the adapter again.",
    ),
    "no factor": Case(
        lambda: with_tensors(built(), **{f"{BLOCK}.norm.weight": (6,)}),
        f"adapter: tensor {BLOCK}.norm.weight [6]: a tensor other than a LoRA factor is not supported.",
        "docs/adapter-layouts.md lists the layouts that lorashard reads.",
    ),
    "twice": Case(
        lambda: with_tensors(built(), **{"score.weight": (2, 6), "module.score.weight": (2, 6)}),
        "module.score.weight and score.weight name the same tensor.",
        "Keep one of them; lorashard does not guess which is meant.",
    ),
    "alone": Case(
        lambda: with_tensors(built(), **{f"{ATTENTION}.lora_A.weight": (2, 6)}),
        f"{ATTENTION}.lora_A.weight has no partner (lora_A and lora_B come in pairs).",
        "The file is incomplete; save the adapter again.",
    ),
    "Unsloth's name": Case(
        lambda: with_pair(built(), f"{BLOCK}.moe", 6, 6, r=1),
        f"{BLOCK}.moe.lora_A.weight [1, 6]: `moe` is Unsloth's name for `experts`, under which PEFT has "
        "the factors of all experts.",
        "Rename the tensors, `.moe.` to `.moe.experts.`, or save the adapter again with PEFT.",
    ),
    "Unsloth's name, not trained": Case(
        lambda: with_pair(built(), f"{BLOCK}.moe", 6, 6, r=0),
        f"{BLOCK}.moe.lora_A.weight [0, 6] {ANOTHER_R.format(r=0)}",
        UNKNOWN_LAYOUT,
    ),
    "another r": Case(
        lambda: with_pair(built(), ATTENTION, 6, 6, r=8),
        f"{ATTENTION}.lora_A.weight [8, 6] {ANOTHER_R.format(r=8)}",
        UNKNOWN_LAYOUT,
    ),
    "beyond the model's": Case(
        built,
        f"{EXPERTS}.3.down_proj.lora_A.weight has expert 3, but the model has 3 experts.",
        "Is `model` the base model of this adapter? If the model has two banks of experts in one list "
        "(ERNIE-4.5-VL: text, then vision), lorashard does not read them.",
        {"num_experts": 3},
    ),
    "more than any model's": Case(
        built,
        "The adapter would have 65537 experts, more than any model has.",
        OTHER_CONFIG,
        {"num_experts": 65537},
    ),
    "more than the router's": Case(
        lambda: built(extras=True),
        "The adapter would have 65536 experts, but its router chooses from 4.",
        OTHER_CONFIG,
        {"num_experts": 65536},
    ),
    "some experts": Case(
        lambda: built(num_experts=11, experts=tuple(range(1, 10))),
        "The adapter trains experts 1, 2, 3, 4, 5, 6, 7, 8 and does not say how many there are.",
        HOW_MANY,
        UNCOUNTED,
    ),
    "some experts of the router's": Case(
        lambda: built(experts=(0, 2), extras=True),
        "The adapter trains experts 0, 2 and does not say how many there are (its router chooses from 4).",
        HOW_MANY,
        UNCOUNTED,
    ),
    "shared factors alone": Case(
        lambda: built("L11", lora_rank=3),
        "The adapter trains no expert by number and does not say how many there are.",
        HOW_MANY,
        UNCOUNTED,
    ),
    "three numbers of experts": Case(
        lambda: with_another_layer(with_another_layer(built("L10"), 3), 2, layer=2),
        f"{EXPERTS}.up_proj.lora_B.weight holds 4 experts, "
        f"{EXPERTS.replace('.0.', '.1.')}.up_proj.lora_B.weight 3.",
        "Is `model` the base model, and do r and rank_pattern match the file?",
        UNCOUNTED,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_says_what_is_wrong_and_what_to_do(case: str) -> None:
    refused = CASES[case]
    with pytest.raises(LorashardError) as caught:
        layout_of(refused.make(), **refused.options)
    assert (caught.value.message, caught.value.hint) == (refused.message, refused.hint)


def test_a_tensor_that_would_be_dropped_is_refused_by_the_rule_against_that() -> None:
    refused = CASES["no factor"]
    with pytest.raises(LorashardError) as caught:
        layout_of(refused.make(), **refused.options)
    assert caught.value.rule is UNSUPPORTED_VARIANTS


def test_as_many_experts_as_any_model_may_have_are_read() -> None:
    assert layout_of(built(), num_experts=2**16).num_experts == 2**16


def test_a_stack_of_two_experts_says_that_there_are_two() -> None:
    assert "holds 2 experts, the model 4" in refusal(built("L10", num_experts=2), num_experts=4)


@pytest.mark.parametrize("name", ["base_model.model.score.bias", f"{ATTENTION}\u200b"])
def test_a_tensor_of_one_element_and_a_name_that_is_not_printed_are_carried(name: str) -> None:
    if name.endswith("bias"):
        adapter = with_tensors(built(), **{name: (1,)})
    else:
        adapter = with_pair(built(), name, 6, 6)
    assert all(entry.name.startswith(name) for entry in layout_of(adapter).replicated)
    assert layout_of(adapter).replicated


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_q_k_or_v_alone_tells_the_hidden_size(name: str) -> None:
    adapter = with_pair(built("L4-down"), f"{BLOCK}.self_attn.{name}", H, H)
    with_pair(adapter, f"{BLOCK}.mlp.shared_expert.down_proj", I, H)
    assert module_of(adapter, orientation=None).stacks[0].projection == "down_proj"


def test_the_attention_of_the_outer_layers_tells_the_hidden_size_of_inner_ones() -> None:
    adapter = built("L4-down")
    for name in list(adapter.tensors):
        inner = name.replace("layers.0.mlp", "layers.0.layers.1.mlp")
        adapter.tensors[inner] = adapter.tensors.pop(name)
    with_pair(adapter, ATTENTION, H, H)
    assert module_of(adapter, orientation=None).stacks[0].projection == "down_proj"


@pytest.mark.parametrize("name", ["gate", "router"])
def test_a_router_beside_the_experts_says_how_many_there_are(name: str) -> None:
    adapter = with_pair(built(), f"{BLOCK}.mlp.{name}", H, 8)
    with pytest.raises(LayoutError, match="its router chooses from 8"):
        layout_of(adapter, num_experts=None)


def test_a_gate_elsewhere_is_no_router() -> None:
    adapter = with_pair(built(), f"{BLOCK}.self_attn.gate", H, 8)
    assert layout_of(adapter, num_experts=None).num_experts == 4


def test_the_class_of_the_model_tells_the_order_of_gate_and_up_rows() -> None:
    config = {
        "base_model_name_or_path": None,
        "auto_mapping": {"base_model_class": "GptOssForCausalLM"},
    }
    adapter = built("L2", config=config)
    assert module_of(adapter).gate_up == "interleaved"
    assert layout_of(adapter).gate_up_known is True


@pytest.mark.parametrize(
    ("layout", "gated", "name", "known"),
    [
        ("L1", True, None, True), ("L2", False, None, True), ("L2", True, None, False),
        ("L2", True, "openai/gpt-oss-20b", True),
    ],
)  # fmt: skip
def test_the_order_is_known_where_there_is_none_or_the_model_is(
    layout: str, gated: bool, name: str | None, known: bool
) -> None:
    adapter = built(layout, gated=gated, config={"base_model_name_or_path": name})
    assert layout_of(adapter).gate_up_known is known
