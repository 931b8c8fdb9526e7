"""The MoE families of transformers, as data: how to build a tiny one and what to adapt in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_ATTENTION = (
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
)
GATED_EXPERTS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_EXPERTS = ("w1", "w2", "w3")
SHARED_EXPERTS = tuple(f"shared_experts.{name}" for name in GATED_EXPERTS)
SHARED_EXPERT = tuple(f"shared_expert.{name}" for name in GATED_EXPERTS)
FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
GRANITE_EXPERTS = (
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
)
GRANITE_SHARED = ("shared_mlp.input_linear", "shared_mlp.output_linear")
DELTA_NET = ("in_proj_qkv", "in_proj_z", "out_proj")

# What the text-only and the multimodal model of a family have in common.
GEMMA = r"model\.(language_model\.)?layers\.\d+\.experts"
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
QWEN4 = HYBRID | {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
GEMMA_MOE = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One MoE architecture.

    modules, parameters: PEFT's target_modules and target_parameters.
    container: pattern that every expert container of the model matches in full.
    config: fields beyond `tiny_models`' sizes; nested mappings go to sub-configs.
    """

    name: str
    model_class: str
    modules: tuple[str, ...] = ATTENTION
    parameters: tuple[str, ...] = ()
    container: str = r"model\.layers\.\d+\.mlp\.experts"
    config: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int = 2
    num_experts: int = 8
    interleaved: bool = False


def fused_family(
    name: str,
    model_class: str,
    modules: tuple[str, ...] = ATTENTION,
    parameters: tuple[str, ...] = FUSED_EXPERTS,
    **fields: Any,
) -> Family:
    """A family whose experts are the 3-D parameters gate_up_proj and down_proj."""
    return Family(name, model_class, modules, parameters, **fields)
