"""What is read from the running engine's layers, on stand-ins with the attributes that are read.

Real layers: test_loading_conformance.py. Here is what they do not show on the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorashard.errors import PlacementError
from lorashard.vllm_plugin.engine.live import (
    interleaves,
    live_experts,
    local_experts,
    moe_wrappers,
    slot_bytes,
)

NAME = "model.layers.0.mlp.experts"
# vLLM's wrappers are known by the names of their classes.
CLASSES = {name: type(name, (SimpleNamespace,), {})
           for name in ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA", "ColumnParallelLinearWithLoRA")}  # fmt: skip


def moe(
    kind: str = "FusedMoEWithLoRA",
    *,
    expert_map: list[int] | None,
    num_experts: int = 4,
    num_slots: int | None = None,
    ep_size: int = 2,
    on_routed_experts: bool = True,
    tp_size: int = 1,
    **config: Any,
) -> Any:
    """A wrapper with 3 LoRA slots, r 8, H 16 and I 4 on the device."""
    held = {} if expert_map is None else {"_expert_map": torch.tensor(expert_map)}
    parallel = SimpleNamespace(use_ep=ep_size > 1, ep_rank=1 if ep_size > 1 else 0, ep_size=ep_size)
    fields = {
        "num_experts": num_experts, "moe_parallel_config": parallel, "is_act_and_mul": True,
        "hidden_dim": 16, "intermediate_size_per_partition": 4,
    }  # fmt: skip
    layer = SimpleNamespace(moe_config=SimpleNamespace(**fields | config))
    if on_routed_experts:
        layer.routed_experts = SimpleNamespace(**held)
    else:
        vars(layer).update(held)
    slots = sum(slot >= 0 for slot in expert_map or range(num_experts))
    slots = slots if num_slots is None else num_slots
    parts = 2 if kind == "FusedMoEWithLoRA" else 1

    def stacks(rows: int, cols: int, count: int) -> tuple[torch.Tensor, ...]:
        shape = (3, slots, rows, cols)
        return tuple(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(count))

    return CLASSES[kind](
        base_layer=layer,
        tp_size=tp_size,
        w13_lora_a_stacked=stacks(8, 16, parts),
        w13_lora_b_stacked=stacks(8 // parts, 8, parts),
        w2_lora_a_stacked=stacks(8, 4, 1),
        w2_lora_b_stacked=stacks(16, 8, 1),
    )


@pytest.mark.parametrize("on_routed_experts", [True, False])
@pytest.mark.parametrize(
    ("expert_map", "experts"),
    [
        ([0, 1, -1, -1], (0, 1)),
        ([-1, 0, -1, 1], (1, 3)),
        ([1, -1, -1, 0], (3, 0)),
        ([-1, -1, -1, -1], ()),
    ],
)
def test_local_experts_stand_in_the_order_of_the_map_s_slots(
    expert_map: list[int], experts: tuple[int, ...], on_routed_experts: bool
) -> None:
    wrapper = moe(expert_map=expert_map, on_routed_experts=on_routed_experts)
    assert local_experts(wrapper, NAME) == experts


def test_shared_experts_that_are_fused_in_behind_the_routed_ones_are_no_experts_of_an_adapter():
    wrapper = moe(expert_map=[-1, -1, 0, 1, 2, 3], num_slots=2)
    assert local_experts(wrapper, NAME) == (2, 3)
    assert live_experts(NAME, wrapper, interleaved=False).local_experts == (2, 3)


@pytest.mark.parametrize(
    ("expert_map", "experts"),
    [([0, 1, 2, -1, -1, -1], (0, 1, 2)), ([-1] * 3 + [0, 1, 2], (3, 0, 1))],
)
def test_eplb_s_redundant_experts_are_the_first_ones_again(
    expert_map: list[int], experts: tuple[int, ...]
) -> None:
    parallel = SimpleNamespace(use_ep=True, ep_rank=1, ep_size=2, enable_eplb=True)
    wrapper = moe(
        expert_map=expert_map, num_experts=6, num_logical_experts=4, moe_parallel_config=parallel
    )
    found = live_experts(NAME, wrapper, interleaved=False)
    assert (found.local_experts, found.num_experts) == (experts, 4)


def test_without_expert_parallelism_every_expert_is_local() -> None:
    assert local_experts(moe(expert_map=None, ep_size=1), NAME) == (0, 1, 2, 3)


def test_expert_parallelism_without_a_map_is_refused() -> None:
    with pytest.raises(PlacementError, match=f"{NAME}: expert parallelism without an expert map"):
        local_experts(moe(expert_map=None), NAME)


@pytest.mark.parametrize("expert_map", [[0, 2, -1, -1], [1, 2, -1, -1], [0, 0, -1, -1]])
def test_slots_that_are_not_numbered_from_0_are_refused(expert_map: list[int]) -> None:
    with pytest.raises(PlacementError, match=f"{NAME}: the local slots .* are not 0, 1, 2"):
        local_experts(moe(expert_map=expert_map), NAME)


def test_a_map_that_contradicts_the_buffers_is_refused() -> None:
    wrapper = moe(expert_map=[0, 1, -1, -1], num_slots=3)
    with pytest.raises(PlacementError, match="names 2 local experts, but the LoRA buffers have 3"):
        live_experts(NAME, wrapper, interleaved=False)


def test_padding_of_the_buffers_is_no_part_of_the_model() -> None:
    wrapper = moe(
        "FusedMoE3DWithLoRA", expert_map=[0, 1, -1, -1], hidden_dim=16, hidden_dim_unpadded=12,
        intermediate_size_per_partition=4, intermediate_size_per_partition_unpadded=3,
    )  # fmt: skip
    live = live_experts(NAME, wrapper, interleaved=True)
    assert (live.wrapper, live.interleaved) == ("3d", True)
    assert (live.hidden_size, live.intermediate_size, live.buffer_intermediate) == (12, 3, 4)
    assert (live.ep_rank, live.ep_size, live.max_lora_rank) == (1, 2, 8)


def test_under_tensor_parallelism_the_sizes_are_those_of_the_whole_layer() -> None:
    live = live_experts(NAME, moe(expert_map=None, ep_size=1, tp_size=2), interleaved=False)
    assert (live.ep_rank, live.ep_size) == (0, 1)
    assert live.intermediate_size == live.buffer_intermediate == 8


def manager(**modules: Any) -> Any:
    return SimpleNamespace(modules=modules, lora_config=SimpleNamespace(max_loras=3))


def test_moe_wrappers_are_known_by_their_classes() -> None:
    dense = CLASSES["ColumnParallelLinearWithLoRA"]()
    two, three = moe(expert_map=[0, -1]), moe("FusedMoE3DWithLoRA", expert_map=[0, -1])
    assert moe_wrappers(manager(a=dense, b=two, c=three)) == {"b": two, "c": three}


def dense_layer(tp_size: int) -> Any:
    return CLASSES["ColumnParallelLinearWithLoRA"](
        tp_size=tp_size,
        lora_a_stacked=(torch.zeros(3, 1, 8, 16), torch.zeros(3, 1, 8, 16)),
        lora_b_stacked=(torch.zeros(3, 1, 5, 8), torch.zeros(3, 1, 7, 8)),
    )


def test_one_slot_has_the_bytes_of_its_share_of_every_buffer() -> None:
    slots, element = 2, 2
    per_slot = 2 * 8 * 16 + 2 * 4 * 8 + 8 * 4 + 16 * 8
    assert slot_bytes(manager(experts=moe(expert_map=[0, 1, -1, -1]))) == slots * element * per_slot
    assert slot_bytes(manager(q=dense_layer(1))) == 4 * (2 * 8 * 16 + 5 * 8 + 7 * 8)


def test_dense_layers_count_whole_under_tensor_parallelism_and_experts_as_they_are() -> None:
    assert slot_bytes(manager(q=dense_layer(4))) == 4 * slot_bytes(manager(q=dense_layer(1)))
    one, four = (moe(expert_map=[0, 1, -1, -1], tp_size=n) for n in (1, 4))
    assert slot_bytes(manager(experts=one)) == slot_bytes(manager(experts=four))


def test_a_module_without_lora_buffers_counts_nothing() -> None:
    assert slot_bytes(
        manager(norm=SimpleNamespace(), experts=moe(expert_map=[0, -1]))
    ) == slot_bytes(manager(experts=moe(expert_map=[0, -1])))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["GptOssForCausalLM"]}, True),
        ({"architectures": ["Other"], "model_type": "gpt_oss"}, True),
        ({"architectures": ["Other"], "text_config": SimpleNamespace(model_type="gpt_oss")}, True),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, False),
        ({"architectures": None}, False),
        ({}, False),
    ],
)
def test_gate_and_up_rows_alternate_in_gpt_oss_alone(
    config: dict[str, Any], expected: bool
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config))
    assert interleaves(SimpleNamespace(model=model)) is expected


def test_a_model_without_a_config_alternates_nothing() -> None:
    assert not interleaves(SimpleNamespace(model=SimpleNamespace()))
