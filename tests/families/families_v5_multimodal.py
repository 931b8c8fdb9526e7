"""MoE models of transformers 5 whose language model is nested in a multimodal one."""

from __future__ import annotations

from families import (
    ATTENTION,
    DELTA_NET,
    GEMMA,
    GEMMA_MOE,
    HYBRID,
    LATENT_ATTENTION,
    QWEN4,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    Family,
    fused_family,
)

_LANGUAGE_MODEL = r"model\.language_model\.layers\.\d+\.mlp\.experts"

# For a sub-config of which transformers does not fix the class.
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

MULTIMODAL_FAMILIES: tuple[Family, ...] = (
    fused_family(
        "aria",
        "AriaForConditionalGeneration",
        ATTENTION + SHARED_EXPERTS,
        container=_LANGUAGE_MODEL,
        config={"vision_config": {"model_type": "idefics3_vision", **_TOWER}},
    ),
    fused_family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        container=_LANGUAGE_MODEL,
        config={"text_config": {"mlp_layer_types": ["sparse", "sparse"]}},
    ),
    fused_family(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        container=r"model\.(decoder|encoder\.language_model)\.layers\.\d+\.experts",
        config={"vision_config": {"model_type": "gemma4_vision", **_TOWER}},
    ),
    fused_family(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        LATENT_ATTENTION,
        container=_LANGUAGE_MODEL,
        config={
            "text_config": {"num_key_value_heads": 4},
            "vision_config": {
                "mlp_layer_types": ["dense", "dense"],
                "per_layer_config": {},
                "adapter_in_dim": 64,
                "adapter_out_dim": 64,
            },
            "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        },
    ),
    fused_family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        num_layers=3,
        container=r"model\.language_model\.layers\.\d+\.mlp\.(text|vision)_moe\.experts",
        config={"text_config": {"moe_intermediate_size": [48, 48], "head_dim": 128}},
    ),
    fused_family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        container=GEMMA,
        config={"text_config": GEMMA_MOE},
    ),
    fused_family("glm4v_moe", "Glm4vMoeForConditionalGeneration", container=_LANGUAGE_MODEL),
    fused_family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        LATENT_ATTENTION + SHARED_EXPERTS,
        container=_LANGUAGE_MODEL,
        config={
            "text_config": {
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 0,
                "mlp_layer_types": ["sparse", "sparse"],
            }
        },
    ),
    fused_family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        container=_LANGUAGE_MODEL,
        config={"vision_config": {"text_hidden_size": 64}},
    ),
    fused_family(
        "llama4",
        "Llama4ForConditionalGeneration",
        ATTENTION + SHARED_EXPERT,
        container=r"language_model\.model\.layers\.\d+\.feed_forward\.experts",
    ),
    fused_family(
        "minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", container=_LANGUAGE_MODEL
    ),
    fused_family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *SHARED_EXPERTS),
        container=_LANGUAGE_MODEL,
        config={"vision_config": {"model_type": "pixtral", **_TOWER}},
    ),
    fused_family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        container=_LANGUAGE_MODEL,
        config={
            "text_config": {"moe_hidden_size": 32},
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8]},
        },
    ),
    fused_family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        ATTENTION + DELTA_NET + SHARED_EXPERT,
        container=_LANGUAGE_MODEL,
        config={"text_config": HYBRID},
    ),
    fused_family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        container=r"thinker\.model\.language_model\.layers\.\d+\.mlp\.experts",
        config={"enable_audio_output": False},
    ),
    fused_family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        container=_LANGUAGE_MODEL,
    ),
    fused_family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", container=_LANGUAGE_MODEL),
    fused_family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        ATTENTION + DELTA_NET + SHARED_EXPERT,
        container=_LANGUAGE_MODEL,
        config={"text_config": QWEN4},
    ),
    fused_family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        container=_LANGUAGE_MODEL,
        config={"text_config": {"mlp_layer_types": ["sparse", "sparse"]}},
    ),
    fused_family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        num_layers=3,
        container=_LANGUAGE_MODEL,
    ),
)
