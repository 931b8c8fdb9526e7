"""MoE families of transformers 4: experts are nn.Linear modules, except the few fused ones."""

from __future__ import annotations

from families import (
    ATTENTION,
    FUSED_EXPERTS,
    GATED_EXPERTS,
    GRANITE_EXPERTS,
    GRANITE_SHARED,
    LATENT_ATTENTION,
    MIXTRAL_EXPERTS,
    SHARED_EXPERT,
    Family,
)

_LANGUAGE_MODEL = r"model\.language_model\.layers\.\d+\.mlp\.experts"
_GRANITE = r"model\.layers\.\d+\.block_sparse_moe\.experts"
_FEED_FORWARD = r"model\.layers\.\d+\.feed_forward\.experts"
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}

# Bare names: transformers 4 also adapts shared experts and dense layers through them.
_DENSE_AND_EXPERTS = ATTENTION + GATED_EXPERTS
_LATENT_AND_EXPERTS = LATENT_ATTENTION + GATED_EXPERTS

FAMILIES: tuple[Family, ...] = (
    Family(
        "aria_text",
        "AriaTextForCausalLM",
        parameters=("experts.fc1.weight", "experts.fc2.weight"),
    ),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT_AND_EXPERTS),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _LATENT_AND_EXPERTS,
        num_layers=3,
        config={"first_k_dense_replace": 1},
    ),
    Family("dots1", "Dots1ForCausalLM", _DENSE_AND_EXPERTS),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _DENSE_AND_EXPERTS, num_layers=3),
    Family("flex_olmo", "FlexOlmoForCausalLM", _DENSE_AND_EXPERTS, num_experts=5),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _DENSE_AND_EXPERTS,
        num_layers=3,
        config={"first_k_dense_replace": 1},
    ),
    Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        _DENSE_AND_EXPERTS,
        container=_LANGUAGE_MODEL,
    ),
    Family("gpt_oss", "GptOssForCausalLM", parameters=FUSED_EXPERTS, interleaved=True),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        parameters=GRANITE_EXPERTS,
        container=_GRANITE,
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        (*ATTENTION, "in_proj", "out_proj", *GRANITE_SHARED),
        parameters=GRANITE_EXPERTS,
        container=_GRANITE,
        config={"layer_types": ["mamba", "attention"]},
    ),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        ATTENTION + GRANITE_SHARED,
        parameters=GRANITE_EXPERTS,
        container=_GRANITE,
    ),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _DENSE_AND_EXPERTS),
    Family(
        "jamba",
        "JambaForCausalLM",
        (*_DENSE_AND_EXPERTS, "in_proj", "out_proj"),
        container=_FEED_FORWARD,
        config={
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    Family(
        "jetmoe",
        "JetMoeForCausalLM",
        ("kv_proj",),
        parameters=("mlp.input_linear.weight", "mlp.output_linear.weight"),
    ),
    Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        ATTENTION + SHARED_EXPERT,
        parameters=FUSED_EXPERTS,
        container=r"language_model\.model\.layers\.\d+\.feed_forward\.experts",
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        (*ATTENTION, *SHARED_EXPERT, "router"),
        parameters=FUSED_EXPERTS,
        container=_FEED_FORWARD,
    ),
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        _LATENT_AND_EXPERTS,
        config={
            "num_layers": 2,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 48,
            "ffn_hidden_size": 48,
        },
    ),
    Family(
        "minimax",
        "MiniMaxForCausalLM",
        (*ATTENTION, "qkv_proj", "out_proj", *MIXTRAL_EXPERTS),
        container=_GRANITE,
    ),
    Family("mixtral", "MixtralForCausalLM", ATTENTION + MIXTRAL_EXPERTS, container=_GRANITE),
    Family("olmoe", "OlmoeForCausalLM", _DENSE_AND_EXPERTS, num_experts=6),
    Family("phimoe", "PhimoeForCausalLM", ATTENTION + MIXTRAL_EXPERTS, container=_GRANITE),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", (*_DENSE_AND_EXPERTS, "shared_expert_gate")),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _DENSE_AND_EXPERTS),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        (*_DENSE_AND_EXPERTS, "in_proj_qkvz", "in_proj_ba", "out_proj"),
        config={"layer_types": ["linear_attention", "full_attention"]},
    ),
    Family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _DENSE_AND_EXPERTS,
        config={"text_config": {"rope_scaling": _MROPE}},
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        parameters=FUSED_EXPERTS,
        container=_LANGUAGE_MODEL,
        config={"text_config": {"rope_scaling": _MROPE}},
    ),
)

SKIPPED: dict[str, str] = {
    "dbrx": "all experts are rows of one 2-D parameter, and share one lora_A",
    "doge": "experts are rows of nn.Embedding tables, without projections",
    "nllb_moe": "encoder-decoder; its experts are named expert_{e}.fc1 and fc2",
    "qwen3_omni_moe": "its talker config cannot be built; qwen3_omni_moe_thinker is covered",
    "switch_transformers": "encoder-decoder; its experts are named expert_{e}.wi and wo",
    "vitpose_backbone": "a pose estimator: one expert per data set, no routing",
}
