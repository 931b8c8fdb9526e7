"""Tiny models of the families that users serve, each with the adapter layouts its users have.

Experts are stacked in transformers 5 in all of them. What adapters look like on disk depends on the
trainer: one tensor for each expert (PEFT with transformers 4), or four for each layer (transformers 5).
"""

from collections.abc import Mapping
from typing import Any

from tests.gpu.reference import VOCABULARY
from tests.gpu.tiny_model import HIDDEN, INTERMEDIATE, TinyModel

# PEFT with transformers 4, or the model's own code, where experts are w1, w3 and w2.
_W_NAMES = (
    (".mlp.experts.", ".block_sparse_moe.experts."),
    ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
)  # fmt: skip


def _text(**changes: Any) -> dict[str, Any]:
    """Fields that the configs of most families share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


def _qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    # Four more tokens, which no prompt has: these stand for images and videos.
    image = VOCABULARY
    text = _text(
        vocab_size=VOCABULARY + 4,
        head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    )
    vision = {
        "depth": 1,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=False,
            image_token_id=image,
            video_token_id=image + 1,
            vision_start_token_id=image + 2,
            vision_end_token_id=image + 3,
        )
    )


def _qwen3_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_text(num_hidden_layers=4, head_dim=64),
            intermediate_size=1024,
            moe_intermediate_size=INTERMEDIATE,
            shared_expert_intermediate_size=INTERMEDIATE,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
        )
    )


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_text(num_key_value_heads=8),
            intermediate_size=1024,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            # For vLLM; transformers knows no other way.
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            q_lora_rank=256,
            # vLLM's kernels for this attention are made for these sizes alone.
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
        )
    )


def _minimax_m2() -> Any:
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    return MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            **_text(head_dim=64),
            intermediate_size=INTERMEDIATE,
            num_local_experts=16,
            num_experts_per_tok=4,
            # As published; vLLM needs them, transformers knows no other way.
            rotary_dim=64,
            scoring_func="sigmoid",
            use_routing_bias=True,
        )
    )


def _llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(
        Llama4TextConfig(
            **_text(num_hidden_layers=4, head_dim=64),
            intermediate_size=INTERMEDIATE,
            intermediate_size_mlp=1024,
            num_local_experts=16,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        )
    )


def _ernie4_5_moe() -> Any:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    return Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            **_text(),
            intermediate_size=1024,
            moe_intermediate_size=INTERMEDIATE,
            moe_num_experts=16,
            moe_k=4,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        )
    )


def _hunyuan() -> Any:
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    return HunYuanMoEV1ForCausalLM(
        HunYuanMoEV1Config(
            **_text(head_dim=64), intermediate_size=INTERMEDIATE, num_experts=16, moe_topk=4
        )
    )


def _granite() -> Any:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    return GraniteMoeForCausalLM(
        GraniteMoeConfig(
            **_text(), intermediate_size=INTERMEDIATE, num_local_experts=16, num_experts_per_tok=4
        )
    )


def _granite_shared() -> Any:
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

    return GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            **_text(),
            intermediate_size=INTERMEDIATE,
            shared_intermediate_size=INTERMEDIATE,
            num_local_experts=16,
            num_experts_per_tok=4,
        )
    )


# Kimi-K2 and Kimi-K2.5's language model are DeepSeek-V3's class, with other sizes.
FAMILIES: Mapping[str, TinyModel] = {
    "qwen3_vl_moe": TinyModel(
        _qwen3_vl_moe,
        ("fused0", "fused1", "e0", "text0"),
        fp8=False,
        transposed_on_disk=True,
        optional=True,
    ),
    "qwen3_next": TinyModel(
        _qwen3_next, ("e0", "e1", "fused0", "shared0", "linear0"), fp8=False, optional=True
    ),
    "deepseek_v3": TinyModel(
        _deepseek_v3, ("e0", "e1", "fused0", "half", "shared0"), fp8=False, optional=True
    ),
    "minimax_m2": TinyModel(
        _minimax_m2,
        ("e0", "e1", "fused0", "half"),
        fp8=False,
        per_expert_names=_W_NAMES,
        optional=True,
    ),
    "llama4": TinyModel(
        _llama4,
        ("fused0", "swapped0", "fused_shared0"),
        fp8=False,
        transposed=True,
        optional=True,
    ),
    "ernie4_5_moe": TinyModel(
        _ernie4_5_moe, ("e0", "e1", "fused0", "shared0"), fp8=False, optional=True
    ),
    "hunyuan": TinyModel(_hunyuan, ("e0", "e1", "fused0", "shared0"), fp8=False, optional=True),
    "granite": TinyModel(_granite, ("fused0", "linears0"), fp8=False, optional=True),
    "granite_shared": TinyModel(
        _granite_shared, ("linears0", "fused_shared0"), fp8=False, optional=True
    ),
}
