"""What is known of a base model: from its config.json, or only from its name. Pure values.

First the facts of a config.json; then what lorashard knows of model families, which it looks up by
`model_type` where a config.json is given and by the names in the adapter's own config where not.
"""

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
# lora/layers/fused_moe.py:553 treats the same architecture separately).
_INTERLEAVED_MODEL_TYPES = ("gpt_oss",)
_INTERLEAVED_NAMES = re.compile("gpt[-_]?oss")

# A base model named after one of these families stores all gate rows before all up rows.
_CONCATENATED_NAMES = re.compile(
    "qwen|mixtral|glm|deepseek|kimi|olmoe|phi|ernie|hunyuan|granite|nemotron|minimax|llama|"
    "gemma|jamba|dots|longcat|mimo|step|exaone|lfm"
)

# Experts without a gate: up, squared ReLU, down.
_NON_GATED_MODEL_TYPES = ("nemotron_h",)

# PEFT >= 0.19 with transformers 5 goes by the module's `is_transposed`. All that store
# [E, in, out] have it but Llama 4's, whose fused factors therefore come out transposed.
_TRANSPOSED_MODEL_TYPES = ("llama4",)
_TRANSPOSED_NAMES = re.compile("llama-?4")

# transformers 4 and vLLM call the projections of these w1, w3, w2, in a `block_sparse_moe`.
_W_NAMED = re.compile("mixtral|phi-?3\\.5-?moe|phimoe|minimax")

# transformers 4, too, keeps the experts of these in one parameter.
_ALWAYS_FUSED = re.compile("gpt[-_]?oss|llama-?4|granite|aria|qwen3[-_]?vl")


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


def merge_facts(options: LayoutOptions, facts: ModelFacts | None) -> LayoutOptions:
    """The options, with what the model's config.json says where they say nothing.

    Raises AdapterError if the two disagree about the number of experts.
    """
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


def gate_up_of(model_type: str) -> GateUp:
    """How a model of this type stores the gate and up rows of its fused experts."""
    if model_type.startswith(_INTERLEAVED_MODEL_TYPES):
        return "interleaved"
    if model_type.startswith(_NON_GATED_MODEL_TYPES):
        return "none"
    return "concatenated"


def gate_up_by_name(base_model: str | None, base_model_class: str | None) -> GateUp | None:
    """The same from the adapter's `base_model_name_or_path` and class; None if they do not show it."""
    names = _lower_case(base_model, base_model_class)
    if _INTERLEAVED_NAMES.search(names):
        return "interleaved"
    return "concatenated" if base_model_class or _CONCATENATED_NAMES.search(names) else None


def fused_orientation(model_type: str) -> Orientation:
    """Which way round PEFT >= 0.19 with transformers 5 wraps the experts of such a model."""
    return "transposed" if model_type.startswith(_TRANSPOSED_MODEL_TYPES) else "standard"


def fused_orientation_by_name(
    base_model: str | None, base_model_class: str | None
) -> Orientation | None:
    """The same from the adapter's `base_model_name_or_path` and class; None if they do not show it."""
    if _TRANSPOSED_NAMES.search(_lower_case(base_model, base_model_class)):
        return "transposed"
    is_known = gate_up_by_name(base_model, base_model_class) is not None
    return "standard" if is_known else None


def uses_w_names(model_names: str) -> bool:
    """Whether such a model's experts, stored one by one, call their projections w1, w3 and w2."""
    return _W_NAMED.search(model_names.lower()) is not None


def has_fused_experts(model_names: str) -> bool:
    """Whether even transformers 4 has no module for each expert of such a model."""
    return _ALWAYS_FUSED.search(model_names.lower()) is not None


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


def _lower_case(base_model: str | None, base_model_class: str | None) -> str:
    return f"{base_model or ''} {base_model_class or ''}".lower()
