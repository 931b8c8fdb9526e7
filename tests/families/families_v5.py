"""MoE language models of transformers 5: experts are 3-D parameters.

In the families of its conversion table, PEFT >= 0.19 reroutes targets such as
`shared_experts.gate_proj` to the routed experts; those have no LoRA on shared experts here.
"""

from __future__ import annotations

from families import (
    ATTENTION,
    DELTA_NET,
    GEMMA,
    GEMMA_MOE,
    GRANITE_SHARED,
    HYBRID,
    LATENT_ATTENTION,
    QWEN4,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    Family,
    fused_family,
)
from families_v5_multimodal import MULTIMODAL_FAMILIES

_GRANITE = r"model\.layers\.\d+\.block_sparse_moe\.experts"
_FEED_FORWARD = r"model\.layers\.\d+\.feed_forward\.experts"

_TEXT_FAMILIES: tuple[Family, ...] = (
    fused_family("afmoe", "AfmoeForCausalLM", num_layers=3, config={"num_dense_layers": 1}),
    fused_family("aria_text", "AriaTextForCausalLM", ATTENTION + SHARED_EXPERTS),
    fused_family("axk1", "AXK1ForCausalLM", LATENT_ATTENTION + SHARED_EXPERTS, num_layers=3),
    fused_family(
        "axk2",
        "AXK2ForCausalLM",
        ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *SHARED_EXPERTS),
        num_layers=3,
    ),
    fused_family("bailing_hybrid", "BailingHybridForCausalLM", ATTENTION + SHARED_EXPERTS),
    fused_family(
        "beam",
        "BeamForCausalLM",
        num_layers=3,
        config={"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    fused_family("cohere2_moe", "Cohere2MoeForCausalLM"),
    fused_family("deepseek_v2", "DeepseekV2ForCausalLM", LATENT_ATTENTION),
    fused_family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LATENT_ATTENTION,
        num_layers=3,
        config={"first_k_dense_replace": 1},
    ),
    fused_family("deepseek_v32", "DeepseekV32ForCausalLM", (*LATENT_ATTENTION, "wq_b", "wk")),
    fused_family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", *SHARED_EXPERTS),
        config={"o_groups": 2, "o_lora_rank": 16},
    ),
    fused_family("dots1", "Dots1ForCausalLM"),
    fused_family(
        "dots3_note_text",
        "models.dots3_note.modeling_dots3_note:Dots3NoteForCausalLM",
        LATENT_ATTENTION + SHARED_EXPERTS,
        config={"num_key_value_heads": 4},
    ),
    fused_family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", num_layers=3),
    fused_family("exaone_moe", "ExaoneMoeForCausalLM"),
    fused_family("flex_olmo", "FlexOlmoForCausalLM", num_experts=5),
    fused_family(
        "flint",
        "FlintForCausalLM",
        ATTENTION + SHARED_EXPERT,
        num_experts=6,
        config={"mlp_only_layers": []},
    ),
    fused_family("gemma4_text", "Gemma4ForCausalLM", container=GEMMA, config=GEMMA_MOE),
    fused_family(
        "glm4_moe", "Glm4MoeForCausalLM", num_layers=3, config={"first_k_dense_replace": 1}
    ),
    fused_family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", LATENT_ATTENTION, num_layers=3),
    fused_family("glm_moe_dsa", "GlmMoeDsaForCausalLM", LATENT_ATTENTION),
    fused_family("gpt_oss", "GptOssForCausalLM", interleaved=True),
    fused_family("granitemoe", "GraniteMoeForCausalLM", container=_GRANITE),
    fused_family(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        ATTENTION + GRANITE_SHARED,
        container=_GRANITE,
    ),
    fused_family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        (*ATTENTION, "in_proj", "out_proj", *GRANITE_SHARED),
        container=_GRANITE,
        config=HYBRID,
    ),
    fused_family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        ATTENTION + GRANITE_SHARED,
        container=_GRANITE,
    ),
    fused_family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    fused_family("hy_v3", "HYV3ForCausalLM", ATTENTION + SHARED_EXPERTS, num_layers=3),
    fused_family("hy_v4", "HYV4ForCausalLM", LATENT_ATTENTION + SHARED_EXPERTS, num_layers=3),
    fused_family(
        "inkling_text",
        "InklingForCausalLM",
        config={"mlp_layer_types": ["sparse", "sparse"], "rel_extent": 16},
    ),
    fused_family("inkling2_text", "Inkling2ForCausalLM"),
    fused_family(
        "jamba",
        "JambaForCausalLM",
        (*ATTENTION, "in_proj", "out_proj"),
        container=_FEED_FORWARD,
        config={
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    fused_family(
        "jetmoe",
        "JetMoeForCausalLM",
        ("kv_proj",),
        parameters=("mlp.input_linear.weight", "mlp.output_linear.weight"),
    ),
    fused_family("kimi_linear", "KimiLinearForCausalLM", ATTENTION + SHARED_EXPERTS, num_layers=3),
    fused_family("kolibri1", "Kolibri1ForCausalLM"),
    fused_family("laguna", "LagunaForCausalLM", num_layers=3),
    fused_family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj"),
        container=_FEED_FORWARD,
        config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    ),
    fused_family(
        "llama4_text",
        "Llama4ForCausalLM",
        (*ATTENTION, *SHARED_EXPERT, "router"),
        container=_FEED_FORWARD,
    ),
    fused_family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        LATENT_ATTENTION,
        config={
            "num_layers": 2,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 48,
            "ffn_hidden_size": 48,
        },
    ),
    fused_family("mellum", "MellumForCausalLM"),
    fused_family("mimo_v2_flash", "MiMoV2FlashForCausalLM", num_layers=3),
    fused_family("minimax", "MiniMaxForCausalLM", (*ATTENTION, "qkv_proj", "out_proj")),
    fused_family("minimax_m2", "MiniMaxM2ForCausalLM", num_experts=6),
    fused_family("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM"),
    fused_family("mistral4", "Mistral4ForCausalLM", LATENT_ATTENTION + SHARED_EXPERTS),
    fused_family("mixtral", "MixtralForCausalLM"),
    fused_family(
        "nemotron_h",
        "NemotronHForCausalLM",
        (*ATTENTION, "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
        parameters=("experts.up_proj", "experts.down_proj"),
        container=r"model\.layers\.\d+\.mixer\.experts",
        config={"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    fused_family("olmoe", "OlmoeForCausalLM", num_experts=6),
    fused_family("phimoe", "PhimoeForCausalLM", (*ATTENTION, "router")),
    fused_family(
        "qwen2_moe", "Qwen2MoeForCausalLM", (*ATTENTION, *SHARED_EXPERT, "shared_expert_gate")
    ),
    fused_family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        ATTENTION + DELTA_NET + SHARED_EXPERT,
        config=HYBRID,
    ),
    fused_family("qwen3_moe", "Qwen3MoeForCausalLM"),
    fused_family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        (*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
        config=HYBRID,
    ),
    fused_family(
        "qwen4_exp_text",
        "Qwen4ExpForCausalLM",
        ATTENTION + DELTA_NET + SHARED_EXPERT,
        config=QWEN4,
    ),
    fused_family("solar_open", "SolarOpenForCausalLM"),
    fused_family(
        "zaya",
        "ZayaForCausalLM",
        ("q_proj", "k_proj", "o_proj"),
        config={"num_experts_per_tok": 1},
    ),
)

FAMILIES = _TEXT_FAMILIES + MULTIMODAL_FAMILIES

SKIPPED: dict[str, str] = {
    "dbrx": "its config cannot be built (no rope_theta); all experts are rows of one 2-D parameter",
    "doge": "experts are rows of nn.Embedding tables, without projections",
    "inkling": "its vision tower needs scipy; inkling_text covers the experts",
    "nllb_moe": "encoder-decoder; its experts are named expert_{e}.fc1 and fc2",
    "openai_privacy_filter": "a token classifier, not a language model",
    "qwen3_omni_moe talker": "its config cannot be built (no spatial_merge_size)",
    "switch_transformers": "encoder-decoder; its experts are named expert_{e}.wi and wo",
    "vitpose_backbone": "a pose estimator: one expert per data set, no routing",
}
