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
_INTERLEAVED_CLASSES = re.compile("gpt_?oss", re.IGNORECASE)

# The Hub's `owner/name`. A path on somebody's disk says nothing of the model in it, and a relative
# path through a folder that training scripts write to is no Hub id either.
_HUB_ID = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>\w[\w.-]*)", re.ASCII)
_LOCAL_FOLDERS = re.compile(
    "(?:model|checkpoint|ckpt|output|result|run|save|weight|experiment|artifact|log)s?|out|exp|"
    "data|tmp|mnt|home|work|workspace|content|cache"
)

# Whole words of a Hub id's name; "qwen3" is one, "philipp" is no phi.
_INTERLEAVED_WORDS = re.compile(r"(?<![a-z0-9])gpt[-_]?oss(?![a-z])")
# A base model of one of these families stores all gate rows before all up rows.
_CONCATENATED_WORDS = re.compile(
    r"(?<![a-z0-9])(?:qwen|mixtral|glm|deepseek|kimi|olmoe|phi|phimoe|ernie|hunyuan|granite|"
    r"granitemoe|nemotron|minimax|llama|gemma|jamba|dots|longcat|mimo|exaone|lfm)(?![a-z])"
)
_STEP_MODELS = re.compile("stepfun-ai/step-?[0-9].*")  # elsewhere "step" counts training steps
# Such a name can be the teacher's, and the base another model.
_DISTILLED = re.compile("(?<![a-z])distil")

# Wrappers and factories do not say which model is in them.
_MODEL_CLASS = re.compile(r"(?!Auto|Peft|FSDP|PreTrained)\w*(?:For[A-Z]\w+|Model)")

# Experts without a gate: up, squared ReLU, down.
_NON_GATED_MODEL_TYPES = ("nemotron_h",)

# PEFT >= 0.19 with transformers 5 goes by the module's `is_transposed`. All that store
# [E, in, out] have it but Llama 4's, whose fused factors therefore come out transposed.
_TRANSPOSED_MODEL_TYPES = ("llama4",)
_TRANSPOSED_NAMES = re.compile("llama-?4(?![0-9])")

# transformers 4 and vLLM call the projections of these w1, w3, w2, in a `block_sparse_moe`.
_W_NAMED = re.compile(r"(?<![a-z0-9])(?:mixtral|phi-?3\.5-?moe|phimoe|minimax)")

# transformers 4, too, keeps the experts of these in one parameter.
_ALWAYS_FUSED = re.compile(
    r"(?<![a-z0-9])(?:gpt[-_]?oss|llama-?4|granite|aria(?:for|text|[^a-z]|$)|qwen3[-_]?vl)"
)


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
            hint="Is this the base model of the adapter? `num_experts` gives the count directly.",
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
            f"`num_experts` is {options.num_experts}, the model has {facts.num_experts} experts.",
            hint="Leave `num_experts` out when `model` is given.",
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
    """The same from the adapter's `base_model_name_or_path` and class; None if they do not show it.

    The class decides if there is one; else a Hub id, by whole words of its name. A local path says
    nothing, nor does a name with the words of two kinds of families.
    """
    if _is_model_class(base_model_class):
        interleaved = _INTERLEAVED_CLASSES.search(base_model_class or "")
        return "interleaved" if interleaved else "concatenated"
    name = _hub_model_name(base_model)
    is_interleaved = _INTERLEAVED_WORDS.search(name) is not None
    is_concatenated = (
        _CONCATENATED_WORDS.search(name) is not None
        or _STEP_MODELS.fullmatch((base_model or "").lower()) is not None
    )
    if is_interleaved == is_concatenated or _DISTILLED.search(name):
        return None
    return "interleaved" if is_interleaved else "concatenated"


def fused_orientation(model_type: str) -> Orientation:
    """Which way round PEFT >= 0.19 with transformers 5 wraps the experts of such a model."""
    return "transposed" if model_type.startswith(_TRANSPOSED_MODEL_TYPES) else "standard"


def fused_orientation_by_name(
    base_model: str | None, base_model_class: str | None
) -> Orientation | None:
    """The same from the adapter's `base_model_name_or_path` and class; None if they do not show it."""
    if gate_up_by_name(base_model, base_model_class) is None:
        return None
    name = base_model_class if _is_model_class(base_model_class) else _hub_model_name(base_model)
    return "transposed" if _TRANSPOSED_NAMES.search((name or "").lower()) else "standard"


def telling_name(
    base_model: str | None, base_model_class: str | None, model_type: str | None
) -> str:
    """What tells a base model's family best: its type, its class, or a name; "" if none is known."""
    model_class = base_model_class if _is_model_class(base_model_class) else None
    return model_type or model_class or base_model or ""


def uses_w_names(model_names: str) -> bool:
    """Whether such a model's experts, stored one by one, call their projections w1, w3 and w2."""
    return any(map(_W_NAMED.search, _last_components(model_names)))


def has_fused_experts(model_names: str) -> bool:
    """Whether even transformers 4 has no module for each expert of such a model."""
    return any(map(_ALWAYS_FUSED.search, _last_components(model_names)))


def _last_components(model_names: str) -> list[str]:
    """Of each name; what the folders above are called says nothing about the model."""
    return [name.rstrip("/").rpartition("/")[2] for name in model_names.lower().split()]


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


def _is_model_class(name: str | None) -> bool:
    return name is not None and _MODEL_CLASS.fullmatch(name) is not None


def _hub_model_name(base_model: str | None) -> str:
    """The name in a Hub id `owner/name`, in lower case; "" if it is a path or there is none."""
    match = _HUB_ID.fullmatch(base_model or "")
    if match is None or _LOCAL_FOLDERS.fullmatch(match["owner"].lower()):
        return ""
    return match["name"].lower()
