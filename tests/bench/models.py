"""Which LoRA tensors an adapter of a real MoE model holds, by name and shape.

Legend: E experts, H hidden size, I expert intermediate size, r LoRA rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Form = Literal["per_expert", "fused"]
FORMS: tuple[Form, ...] = ("per_expert", "fused")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer that LoRA wraps; `name` is relative to its block."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class MoeModel:
    """The sizes of a base model that decide an adapter's tensors.

    The first `num_dense_layers` layers have a dense MLP in place of experts.
    """

    base_model: str
    num_layers: int
    num_dense_layers: int
    num_experts: int
    hidden_size: int
    expert_intermediate_size: int
    dense_intermediate_size: int
    has_shared_experts: bool
    attention: tuple[Linear, ...]


def _grouped_query_attention(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Linear, ...]:
    return (
        Linear("q_proj", hidden_size, num_heads * head_dim),
        Linear("k_proj", hidden_size, num_kv_heads * head_dim),
        Linear("v_proj", hidden_size, num_kv_heads * head_dim),
        Linear("o_proj", num_heads * head_dim, hidden_size),
    )


def _multi_head_latent_attention(num_heads: int) -> tuple[Linear, ...]:
    # DeepSeek-V3's latent sizes, which Kimi-K2 kept.
    return (
        Linear("q_a_proj", 7168, 1536),
        Linear("q_b_proj", 1536, num_heads * 192),
        Linear("kv_a_proj_with_mqa", 7168, 576),
        Linear("kv_b_proj", 512, num_heads * 256),
        Linear("o_proj", num_heads * 128, 7168),
    )


# Sizes: the models' public config.json files.
MODELS = {
    "glm-4.5-air": MoeModel(
        base_model="zai-org/GLM-4.5-Air",
        num_layers=46,
        num_dense_layers=1,
        num_experts=128,
        hidden_size=4096,
        expert_intermediate_size=1408,
        dense_intermediate_size=10944,
        has_shared_experts=True,
        attention=_grouped_query_attention(4096, 96, 8, 128),
    ),
    "qwen3-30b-a3b": MoeModel(
        base_model="Qwen/Qwen3-30B-A3B",
        num_layers=48,
        num_dense_layers=0,
        num_experts=128,
        hidden_size=2048,
        expert_intermediate_size=768,
        dense_intermediate_size=0,
        has_shared_experts=False,
        attention=_grouped_query_attention(2048, 32, 4, 128),
    ),
    "qwen3-235b-a22b": MoeModel(
        base_model="Qwen/Qwen3-235B-A22B",
        num_layers=94,
        num_dense_layers=0,
        num_experts=128,
        hidden_size=4096,
        expert_intermediate_size=1536,
        dense_intermediate_size=0,
        has_shared_experts=False,
        attention=_grouped_query_attention(4096, 64, 4, 128),
    ),
    "deepseek-v3": MoeModel(
        base_model="deepseek-ai/DeepSeek-V3",
        num_layers=61,
        num_dense_layers=3,
        num_experts=256,
        hidden_size=7168,
        expert_intermediate_size=2048,
        dense_intermediate_size=18432,
        has_shared_experts=True,
        attention=_multi_head_latent_attention(128),
    ),
    "kimi-k2": MoeModel(
        base_model="moonshotai/Kimi-K2-Instruct",
        num_layers=61,
        num_dense_layers=1,
        num_experts=384,
        hidden_size=7168,
        expert_intermediate_size=2048,
        dense_intermediate_size=18432,
        has_shared_experts=True,
        attention=_multi_head_latent_attention(64),
    ),
}


def scale_layers(model: MoeModel, scale: float) -> MoeModel:
    """Keep `scale` of the layers: at least 2, at least 1 of them with experts.

    Only the depth shrinks: tensor shapes, and so the size of each read, stay real.
    """
    num_layers = max(2, round(model.num_layers * scale))
    num_dense_layers = min(model.num_dense_layers, num_layers - 1)
    return replace(model, num_layers=num_layers, num_dense_layers=num_dense_layers)


def _pair(module: str, linear: Linear, lora_rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    prefix = f"{module}.{linear.name}"
    yield f"{prefix}.lora_A.weight", (lora_rank, linear.in_features)
    yield f"{prefix}.lora_B.weight", (linear.out_features, lora_rank)


def _mlp(hidden_size: int, intermediate_size: int) -> tuple[Linear, ...]:
    return (
        Linear("gate_proj", hidden_size, intermediate_size),
        Linear("up_proj", hidden_size, intermediate_size),
        Linear("down_proj", intermediate_size, hidden_size),
    )


def _fused_experts(
    model: MoeModel, experts: str, lora_rank: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    # PEFT stacks every expert's rank into one pair: r * E is the inner dimension. The
    # pair named `base_layer` is gate_up_proj, the outer one is down_proj.
    hidden_size, intermediate_size = model.hidden_size, model.expert_intermediate_size
    stacked_rank = model.num_experts * lora_rank
    yield f"{experts}.base_layer.lora_A.weight", (stacked_rank, hidden_size)
    yield f"{experts}.base_layer.lora_B.weight", (2 * intermediate_size, stacked_rank)
    yield f"{experts}.lora_A.weight", (stacked_rank, intermediate_size)
    yield f"{experts}.lora_B.weight", (hidden_size, stacked_rank)


def _layer(
    model: MoeModel, layer: int, form: Form, lora_rank: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    prefix = f"base_model.model.model.layers.{layer}"
    for linear in model.attention:
        yield from _pair(f"{prefix}.self_attn", linear, lora_rank)

    # A `fused` adapter has no dense or shared-expert LoRA: from 0.19 PEFT sends
    # target_modules that name these projections to the routed experts instead.
    if layer < model.num_dense_layers:
        if form == "per_expert":
            for linear in _mlp(model.hidden_size, model.dense_intermediate_size):
                yield from _pair(f"{prefix}.mlp", linear, lora_rank)
        return

    expert_mlp = _mlp(model.hidden_size, model.expert_intermediate_size)
    if form == "fused":
        yield from _fused_experts(model, f"{prefix}.mlp.experts", lora_rank)
        return
    for expert in range(model.num_experts):
        for linear in expert_mlp:
            yield from _pair(f"{prefix}.mlp.experts.{expert}", linear, lora_rank)
    if model.has_shared_experts:
        for linear in expert_mlp:
            yield from _pair(f"{prefix}.mlp.shared_experts", linear, lora_rank)


def adapter_shapes(model: MoeModel, form: Form, lora_rank: int) -> dict[str, tuple[int, int]]:
    """Return {tensor name: shape}, in no useful order."""
    return {
        name: shape
        for layer in range(model.num_layers)
        for name, shape in _layer(model, layer, form, lora_rank)
    }
