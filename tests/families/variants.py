"""Variants: LoRA settings on a few families, among them the adapters lorashard must refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from case import Case
from families import ATTENTION, FUSED_EXPERTS, GATED_EXPERTS, MIXTRAL_EXPERTS, Family

_ALL_PROJECTIONS = {"target_modules": [*ATTENTION, *GATED_EXPERTS], "target_parameters": None}


def _shared_variants(families: Mapping[str, Family]) -> tuple[Case, ...]:
    """Settings that both environments accept."""
    qwen3 = families["qwen3_moe"]
    targets = list(qwen3.modules)
    return (
        Case("qwen3_moe-rslora", qwen3, {"use_rslora": True}),
        Case("qwen3_moe-bf16", qwen3, dtype=torch.bfloat16),
        Case("qwen3_moe-named", qwen3, adapter_name="policy"),
        # Ten or more experts: as text, expert 10 sorts before expert 2.
        Case("qwen3_moe-twelve_experts", replace(qwen3, num_experts=12)),
        Case("qwen3_moe-head", qwen3, {"target_modules": [*targets, "embed_tokens", "lm_head"]}),
        Case(
            "qwen3_moe-one_layer",
            qwen3,
            {"layers_to_transform": [1], "layers_pattern": "layers"},
        ),
        # Qwen2-MoE, because its attention has biases to save.
        Case("qwen2_moe-bias", families["qwen2_moe"], {"bias": "all"}, refuse="bias"),
        Case(
            "qwen3_moe-modules_to_save",
            qwen3,
            {"modules_to_save": ["lm_head"]},
            refuse="modules_to_save",
        ),
        Case(
            "qwen3_moe-tokens",
            qwen3,
            {"trainable_token_indices": [3, 5]},
            refuse="trainable_token_indices",
        ),
        Case(
            "qwen3_moe-attention_only",
            qwen3,
            {"target_modules": list(ATTENTION), "target_parameters": None},
            refuse="experts",
        ),
        # One of the two fused parameters; its key does not say which (except in Granite).
        Case("gpt_oss-gate_up", families["gpt_oss"], _only("experts.gate_up_proj")),
        Case("gpt_oss-down", families["gpt_oss"], _only("experts.down_proj")),
        Case("llama4_text-gate_up", families["llama4_text"], _only("experts.gate_up_proj")),
        Case("llama4_text-down", families["llama4_text"], _only("experts.down_proj")),
        # A [E, 2I] bias is one 2-D parameter for PEFT; the wrappers nest four deep.
        Case(
            "gpt_oss-expert_bias",
            families["gpt_oss"],
            {"target_parameters": [*FUSED_EXPERTS, *(f"{name}_bias" for name in FUSED_EXPERTS)]},
            refuse="bias",
        ),
        Case("gpt_oss-rslora", families["gpt_oss"], {"use_rslora": True}),
        Case("gpt_oss-bf16", families["gpt_oss"], dtype=torch.bfloat16),
        Case("gpt_oss-six_experts", replace(families["gpt_oss"], num_experts=6)),
        Case(
            "gpt_oss-patterns",
            families["gpt_oss"],
            {
                "rank_pattern": {r"layers\.0\..*gate_up_proj": 6, "q_proj": 2},
                "alpha_pattern": {r".*\.experts\.down_proj": 20, "k_proj": 3},
            },
        ),
    )


def _only(parameter: str) -> dict[str, object]:
    return {"target_parameters": [parameter]}


def v5_variants(families: Mapping[str, Family]) -> tuple[Case, ...]:
    """Variants of transformers 5; fused experts."""
    qwen3 = families["qwen3_moe"]
    nemotron = families["nemotron_h"]
    return (
        *_shared_variants(families),
        Case(
            "qwen3_moe-patterns",
            qwen3,
            {
                "rank_pattern": {r".*\.gate_up_proj": 6, "layers.1.self_attn.q_proj": 2},
                "alpha_pattern": {r"experts\.down_proj": 20, "k_proj": 3},
            },
        ),
        Case("qwen3_moe-gate_up", qwen3, _only("experts.gate_up_proj")),
        Case("qwen3_moe-down", qwen3, _only("experts.down_proj")),
        Case(
            "qwen3_moe-router",
            qwen3,
            {"target_parameters": [*qwen3.parameters, "mlp.gate.weight"]},
        ),
        Case(
            "gpt_oss-router",
            families["gpt_oss"],
            {"target_parameters": [*qwen3.parameters, "mlp.router.weight"]},
        ),
        # PEFT turns these targets into the fused parameters, with twice the rank for gate_up.
        Case("qwen3_moe-projections", qwen3, _ALL_PROJECTIONS),
        Case("qwen3_moe-projections_rslora", qwen3, _ALL_PROJECTIONS | {"use_rslora": True}),
        Case(
            "qwen3_moe-all_linear",
            qwen3,
            {"target_modules": "all-linear", "target_parameters": None},
        ),
        Case(
            "mixtral-projections",
            families["mixtral"],
            {"target_modules": [*ATTENTION, *MIXTRAL_EXPERTS, "gate"], "target_parameters": None},
        ),
        Case("glm4_moe-projections", families["glm4_moe"], _ALL_PROJECTIONS),
        # Qwen2-MoE is not in PEFT's table: the same targets reach its shared expert only.
        Case("qwen2_moe-projections", families["qwen2_moe"], _ALL_PROJECTIONS, refuse="experts"),
        # A transformers 4 adapter, loaded and saved again. Only these have the block-diagonal
        # lora_B that conversion makes; training fills all of it. With rslora PEFT 0.21 keeps
        # alpha / sqrt(r) right for down_proj only: gate and up come out sqrt(2) larger.
        Case("qwen3_moe-resaved", qwen3, _ALL_PROJECTIONS, from_per_expert=True),
        Case(
            "qwen3_moe-resaved_rslora",
            qwen3,
            _ALL_PROJECTIONS | {"use_rslora": True},
            from_per_expert=True,
        ),
        Case("glm4_moe-resaved", families["glm4_moe"], _ALL_PROJECTIONS, from_per_expert=True),
        Case("nemotron_h-up", nemotron, _only("experts.up_proj")),
        Case(
            "nemotron_h-latent",
            replace(nemotron, config={**nemotron.config, "moe_latent_size": 32}),
        ),
    )


def v4_variants(families: Mapping[str, Family]) -> tuple[Case, ...]:
    """Variants of transformers 4; per-expert keys, except Granite."""
    qwen3 = families["qwen3_moe"]
    mixtral = families["mixtral"]
    granite = families["granitemoe"]
    return (
        *_shared_variants(families),
        Case(
            "qwen3_moe-patterns",
            qwen3,
            {
                "rank_pattern": {r"layers\.0\.mlp\.experts\.3\.down_proj": 2, "up_proj": 6},
                "alpha_pattern": {r"mlp\.experts\.5\.gate_proj": 20, "k_proj": 3},
            },
        ),
        Case(
            "qwen3_moe-some_experts",
            qwen3,
            {"target_modules": r".*\.(self_attn\.[qv]_proj|experts\.[15]\.(gate|up|down)_proj)"},
        ),
        Case(
            "qwen3_moe-experts_of_layer_0",
            qwen3,
            {"target_modules": r".*\.(q_proj|layers\.0\.mlp\.experts\.\d+\.\w+_proj)"},
        ),
        Case("qwen3_moe-down", qwen3, {"target_modules": ["q_proj", "down_proj"]}),
        Case("qwen3_moe-gate_up", qwen3, {"target_modules": ["q_proj", "gate_proj", "up_proj"]}),
        Case("qwen3_moe-router", qwen3, {"target_modules": [*qwen3.modules, "gate"]}),
        Case("mixtral-router", mixtral, {"target_modules": [*mixtral.modules, "gate"]}),
        Case("mixtral-six_experts", replace(mixtral, num_experts=6)),
        # Without layers_pattern PEFT takes the last index of a name: expert 1 of every layer.
        Case("qwen3_moe-layers_to_transform", qwen3, {"layers_to_transform": [1]}),
        Case("granitemoe-input", granite, _only("block_sparse_moe.input_linear.weight")),
        Case("granitemoe-output", granite, _only("block_sparse_moe.output_linear.weight")),
        # PEFT refuses these three for target_parameters, so there is no fused counterpart.
        Case("qwen3_moe-dora", qwen3, {"use_dora": True}, refuse="dora"),
        Case("qwen3_moe-lora_bias", qwen3, {"lora_bias": True}, refuse="lora_bias"),
        Case("qwen3_moe-olora", qwen3, {"init_lora_weights": "olora"}, refuse="init_lora_weights"),
    )
