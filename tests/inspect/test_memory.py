"""Memory by hand for one layer; tests/vllm_plugin/test_memory_conformance.py asks vLLM itself."""

from __future__ import annotations

from lorashard.inspect.memory import expert_buffer_bytes, host_bytes_lorashard, host_bytes_stock

ONE = {
    "num_local_experts": 3, "max_loras": 2, "max_lora_rank": 8, "hidden_size": 10,
    "intermediate_size": 7, "element_size": 2,
}  # fmt: skip
SLOT = 2 * 3 * 8 * 2  # max_loras, experts, r, bytes


def test_a_gated_layer_has_two_inputs_and_outputs_before_the_down_projection() -> None:
    assert expert_buffer_bytes(**ONE, gated=True) == SLOT * (2 * 10 + 2 * 7 + 7 + 10)


def test_a_layer_without_gate_has_one_of_each() -> None:
    assert expert_buffer_bytes(**ONE, gated=False) == SLOT * (10 + 7 + 7 + 10)


def test_the_wrapper_for_fused_experts_shares_one_input_and_ignores_the_gate() -> None:
    expected = SLOT * (10 + 2 * 7 + 7 + 10)
    assert expert_buffer_bytes(**ONE, gated=True, wrapper="3d") == expected
    assert expert_buffer_bytes(**ONE, gated=False, wrapper="3d") == expected


def test_vllm_alone_holds_own_experts_twice_or_all_experts_once() -> None:
    assert host_bytes_stock("per_expert", 1000, 100, 7) == 207
    assert host_bytes_stock("fused", 1000, 100, 7, rank_lora_b_bytes=60) == 1067


def test_with_lorashard_a_rank_holds_its_own_shard_once() -> None:
    assert host_bytes_lorashard(100, 7) == 107
