"""What is known of a base model: from its config.json, or from its name. Pure values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorashard.adapter.options import GateUp, LayoutOptions, Orientation
from lorashard.errors import AdapterError

_EXPERT_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")

# What goes in and out of the experts; nemotron_h and muse_spark can have them narrower.
_EXPERT_WIDTH_KEYS = ("moe_latent_size", "moe_hidden_size", "hidden_size")

_NESTED_CONFIGS = ("text_config", "thinker_config", "llm_config", "language_config")

# gpt-oss stores gate and up rows alternately (transformers GptOssExperts; vLLM
# lora/layers/fused_moe.py:553 treats the same architecture apart).
_INTERLEAVED_MODEL_TYPES = frozenset({"gpt_oss"})

# A base model called after one of these is none of the interleaved ones.
_KNOWN_FAMILIES = re.compile(
    "qwen|mixtral|glm|deepseek|kimi|olmoe|phi|ernie|hunyuan|granite|nemotron|minimax|llama|"
    "gemma|jamba|dots|longcat|mimo|step|exaone|lfm"
)

# transformers 4 and vLLM call the projections of these w1, w3, w2, in a `block_sparse_moe`.
_W_NAMED = re.compile("mixtral|phi-?3\\.5-?moe|phimoe|minimax")

# transformers 4 keeps the experts of these in one parameter already.
_FUSED_ALREADY = re.compile("gpt[-_]?oss|llama-?4|granite|aria|qwen3[-_]?vl")

# Experts without a gate: up, squared ReLU, down.
_NON_GATED_MODEL_TYPES = frozenset({"nemotron_h"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a base model's config.json says about its experts.

    num_expert_group: > 1 lets vLLM place experts round-robin.
    """

    model_type: str
    num_experts: int | None
    hidden_size: int | None
    intermediate_size: int | None
    gate_up: GateUp
    num_expert_group: int | None


def parse_model_config(config: Mapping[str, Any], where: str) -> ModelFacts:
    """Read a Hugging Face config.json; multimodal models keep the text model's part nested.

    Raises AdapterError if it names no experts.
    """
    text = _text_config(config)
    num_experts = next((_count(text[key]) for key in _EXPERT_COUNT_KEYS if text.get(key)), None)
    if num_experts is None:
        raise AdapterError(
            f"{where}: no expert count ({', '.join(_EXPERT_COUNT_KEYS)}).",
            hint="Is this the base model of the adapter? --num-experts gives the count directly.",
        )
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    return ModelFacts(
        model_type=model_type,
        num_experts=num_experts,
        hidden_size=next((_count(text[key]) for key in _EXPERT_WIDTH_KEYS if text.get(key)), None),
        intermediate_size=_count(text.get("moe_intermediate_size")),
        gate_up=gate_up_of(model_type),
        num_expert_group=_count(text.get("n_group")),
    )


def gate_up_of(model_type: str) -> GateUp:
    """How a model of this type stores the gate and up rows of its fused experts."""
    if any(model_type.startswith(known) for known in _INTERLEAVED_MODEL_TYPES):
        return "interleaved"
    if any(model_type.startswith(known) for known in _NON_GATED_MODEL_TYPES):
        return "none"
    return "concatenated"


def gate_up_named(base_model: str | None, base_model_class: str | None) -> GateUp | None:
    """The same, as far as the adapter's config names its base model."""
    named = f"{base_model or ''} {base_model_class or ''}".lower()
    if re.search("gpt[-_]?oss", named):
        return "interleaved"
    return "concatenated" if base_model_class or _KNOWN_FAMILIES.search(named) else None


def fused_orientation(model_type: str) -> Orientation:
    """Which way round PEFT >= 0.19 with transformers 5 wraps the experts of such a model.

    It goes by the module's `is_transposed`, which all that store [E, in, out] have but Llama 4's.
    """
    return "transposed" if model_type.startswith("llama4") else "standard"


def fused_orientation_named(
    base_model: str | None, base_model_class: str | None
) -> Orientation | None:
    """The same, as far as the adapter's config names its base model."""
    named = f"{base_model or ''} {base_model_class or ''}".lower()
    if re.search("llama-?4", named):
        return "transposed"
    known = gate_up_named(base_model, base_model_class) is not None
    return "standard" if known else None


def spelled_w(named: str) -> bool:
    """Whether the projections of such a model's experts are called w1, w3 and w2, one by one."""
    return _W_NAMED.search(named.lower()) is not None


def fused_already(named: str) -> bool:
    """Whether transformers 4, too, has no module for each expert of such a model."""
    return _FUSED_ALREADY.search(named.lower()) is not None


def merge_facts(options: LayoutOptions, facts: ModelFacts | None) -> LayoutOptions:
    """Flags first, then what the model's config.json says."""
    if facts is None:
        return options
    if options.num_experts not in (None, facts.num_experts):
        raise AdapterError(
            f"--num-experts is {options.num_experts}, the model has {facts.num_experts} experts.",
            hint="Leave --num-experts out when --model is given.",
        )
    return replace(
        options,
        num_experts=facts.num_experts,
        hidden_size=options.hidden_size or facts.hidden_size,
        intermediate_size=options.intermediate_size or facts.intermediate_size,
        gate_up=options.gate_up or facts.gate_up,
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _NESTED_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, dict) and not any(config.get(k) for k in _EXPERT_COUNT_KEYS):
            return _text_config(nested)
    return config


def _count(value: Any) -> int | None:
    if isinstance(value, list) and value and len(set(map(str, value))) == 1:
        value = value[0]  # one number per layer or modality, all the same
    return value if type(value) is int and value > 0 else None
