"""`lorashard.inspect.memory` against the buffers that vLLM 0.33.0 allocates, run on the CPU."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest

from lorashard.inspect.memory import (
    Wrapper,
    expert_buffer_bytes,
    host_bytes_lorashard,
    host_bytes_stock,
)
from tests.vllm_release import run_in_release

RELEASE = "0.33.0"

# vLLM's class per wrapper, and whether its experts are gated. The 3D class does not ask.
KINDS: dict[str, tuple[Wrapper, bool]] = {
    "2d gated": ("2d", True),
    "2d non-gated": ("2d", False),
    "3d": ("3d", True),
    "3d non-gated": ("3d", False),
}
SIZES: list[dict[str, int]] = [
    {
        "num_local_experts": num_local_experts,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "element_size": element_size,
    }
    for num_local_experts, max_loras, max_lora_rank, (hidden_size, intermediate_size), element_size
    in product((1, 3, 8), (1, 4), (8, 32), ((96, 40), (32, 112)), (2, 4))
]  # fmt: skip

# The real classes and the real methods; only the layer underneath, which would need a GPU, is
# stood in for by the attributes of `moe_config` that the methods read. max_loras goes through the
# real `lora_slots`, because that is what the manager passes.
SCRIPT = """
from types import SimpleNamespace
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager

STACKS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")

def allocate(wrapper, gated, size):
    cls = FusedMoE3DWithLoRA if wrapper == "3d" else FusedMoEWithLoRA
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.device, layer.tp_size, layer.tp_rank = torch.device("cpu"), 1, 0
    layer._w13_slices = 2 if gated and wrapper == "2d" else 1
    layer.enable_moe_shared_loras = False
    layer.moe_config = SimpleNamespace(
        hidden_dim=size["hidden_size"],
        intermediate_size_per_partition=size["intermediate_size"],
        num_local_experts=size["num_local_experts"],
        num_experts=2 * size["num_local_experts"],
        moe_parallel_config=SimpleNamespace(use_ep=True, ep_rank=1),
    )
    config = LoRAConfig(
        max_loras=size["max_loras"],
        max_lora_rank=size["max_lora_rank"],
        lora_dtype={2: torch.bfloat16, 4: torch.float32}[size["element_size"]],
    )
    slots = LoRAModelManager.lora_slots.fget(SimpleNamespace(lora_config=config))
    layer.create_lora_weights(slots, config, SimpleNamespace(architectures=["AnyForCausalLM"]))
    tensors = {
        name: [[list(t.shape), t.untyped_storage().nbytes()] for t in getattr(layer, name)]
        for name in STACKS
    }
    tensors["adapter_enabled"] = [
        [list(layer.adapter_enabled.shape), layer.adapter_enabled.untyped_storage().nbytes()]
    ]
    return tensors

answer([allocate(*case) for case in CASES])
"""

Tensors = dict[str, list[tuple[list[int], int]]]
Case = tuple[Wrapper, bool, dict[str, int]]


@cache
def allocations() -> list[tuple[Case, Tensors]]:
    cases: list[Case] = [(*kind, size) for kind in KINDS.values() for size in SIZES]
    answers: list[Any] = run_in_release(RELEASE, f"CASES = {cases!r}\n{SCRIPT}")
    return list(zip(cases, answers, strict=True))


def allocated(kind: str) -> list[tuple[dict[str, int], Tensors]]:
    return [(case[2], tensors) for case, tensors in allocations() if case[:2] == KINDS[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_buffers_take_the_bytes_that_vllm_allocates(kind: str) -> None:
    wrapper, gated = KINDS[kind]
    rows = allocated(kind)
    assert len(rows) == len(SIZES)
    for size, tensors in rows:
        in_vllm = sum(
            size_bytes
            for name, stack in tensors.items()
            if name != "adapter_enabled"
            for _, size_bytes in stack
        )
        assert expert_buffer_bytes(**size, gated=gated, wrapper=wrapper) == in_vllm, size


@pytest.mark.parametrize("kind", KINDS)
def test_every_stack_has_max_loras_slots_and_the_local_experts(kind: str) -> None:
    for size, tensors in allocated(kind):
        leading = {
            tuple(shape[:2])
            for name, stack in tensors.items()
            if name != "adapter_enabled"
            for shape, _ in stack
        }
        assert leading == {(size["max_loras"], size["num_local_experts"])}, size


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_counted_is_four_bytes_a_slot_and_one(kind: str) -> None:
    for size, tensors in allocated(kind):
        assert [n for _, n in tensors["adapter_enabled"]] == [4 * (size["max_loras"] + 1)], size


# GLM-4.5-Air shapes, 8 MoE layers of 128 experts and 9 attention layers, r 32, bf16, ep_size 2:
# the adapters whose loading was measured on vLLM 0.33.0 (two H200). Bytes of all experts.
HIDDEN, INTERMEDIATE = 4096, 1408
ALL_EXPERTS = 2 * 8 * 128 * 32  # element size, layers, experts, r: bytes per feature
PER_EXPERT = ALL_EXPERTS * 3 * (HIDDEN + INTERMEDIATE)
FUSED_LORA_A = ALL_EXPERTS * (HIDDEN + INTERMEDIATE)
FUSED_LORA_B = ALL_EXPERTS * (2 * INTERMEDIATE + HIDDEN)
REPLICATED = 2 * 9 * 32 * (2 * (HIDDEN + 4096) + 2 * (HIDDEN + 1024))


def test_host_floor_of_a_per_expert_adapter_is_just_below_the_measured_growth() -> None:
    floor = host_bytes_stock("per_expert", PER_EXPERT, PER_EXPERT // 2, REPLICATED)
    assert 0.85 * 1.23e9 < floor < 1.23e9


def test_host_floor_of_a_fused_adapter_is_just_below_the_measured_growth() -> None:
    experts = FUSED_LORA_A + FUSED_LORA_B
    floor = host_bytes_stock(
        "fused", experts, experts // 2, REPLICATED, rank_lora_b_bytes=FUSED_LORA_B // 2
    )
    assert 0.85 * 1.22e9 < floor < 1.22e9


def test_lorashard_needs_one_copy_of_what_the_rank_loads() -> None:
    assert host_bytes_lorashard(PER_EXPERT // 2, REPLICATED) == pytest.approx(0.556e9, rel=0.01)
