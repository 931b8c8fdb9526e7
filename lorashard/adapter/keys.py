"""Tensor names -> what they name. Pure; the only place that knows how writers spell keys.

The layout numbers (L1 ... L16) are those of docs/adapter-layouts.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorashard.rules import UNSUPPORTED_VARIANTS, Rule

Projection = Literal["gate_proj", "up_proj", "down_proj", "gate_up_proj"]
Matrix = Literal["lora_A", "lora_B"]

# How the tensor holds its experts:
#   expert      one expert's 2-D factor                                 L1, L9, L15
#   stacked     expert-agnostic name, dim 0 = experts, or shared by all L8 to L12, L14
#   inner       PEFT fused, the innermost wrapped parameter             L2, L3, L6, L7, L16
#   outer       PEFT fused, the outermost (or only) wrapped parameter   L2, L3, L4, L6, L7, L16
#   parameter   PEFT fused, with the parameter's name in the key        L5
#   native      NeMo AutoModel's own orientation, [E, in, r]            L13
Kind = Literal["expert", "stacked", "inner", "outer", "parameter", "native"]

PEFT_PREFIX = "base_model.model."

_PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate_proj", "w1": "gate_proj",
    "up_proj": "up_proj", "w3": "up_proj",
    "down_proj": "down_proj", "w2": "down_proj",
    "gate_up_proj": "gate_up_proj",
    # unsloth's per-expert 4-bit gpt-oss (L15)
    "gate_up_projs": "gate_up_proj", "down_projs": "down_proj",
    # granitemoe's ParallelExperts modules (L5)
    "input_linear": "gate_up_proj", "output_linear": "down_proj",
    # NeMo AutoModel (L13)
    "gate_and_up": "gate_up_proj", "down": "down_proj",
}  # fmt: skip

_MATRICES: dict[str, Matrix] = {
    "lora_A": "lora_A", "A": "lora_A", "lora_embedding_A": "lora_A",
    "lora_B": "lora_B", "B": "lora_B", "lora_embedding_B": "lora_B",
}  # fmt: skip

_PREFIX = r"(?:base_model\.model\.)?"
_CONTAINER = r"(?P<module>(?:[^ ]+\.)?experts)"
_MATRIX = r"\.(?P<matrix>lora_[AB])(?:\.weight)?"

_EXPERT = re.compile(
    rf"{_PREFIX}{_CONTAINER}\.(?P<expert>[0-9]{{1,9}})\.(?P<projection>\w+){_MATRIX}"
)
_PROJECTION_LIST = re.compile(
    rf"{_PREFIX}{_CONTAINER}\.(?P<projection>gate_up_projs|down_projs)\.(?P<expert>[0-9]{{1,9}}){_MATRIX}"
)
_STACKED = re.compile(rf"{_PREFIX}{_CONTAINER}\.(?P<projection>\w+){_MATRIX}")
_INNER = re.compile(rf"{_PREFIX}{_CONTAINER}\.base_layer{_MATRIX}")
_OUTER = re.compile(rf"{_PREFIX}{_CONTAINER}{_MATRIX}")
_PARAMETER = re.compile(
    rf"{_PREFIX}(?P<module>(?:[^ ]+\.)?block_sparse_moe)"
    rf"\.(?P<projection>input_linear|output_linear){_MATRIX}"
)
_NATIVE = re.compile(
    rf"{_PREFIX}{_CONTAINER}\.lora_(?P<projection>gate_and_up|down)_(?P<matrix>[AB])"
)
_DENSE_NAME = re.compile(
    rf"{_PREFIX}(?P<module>[^ ]+)\.(?P<projection>gate_proj|up_proj|down_proj){_MATRIX}"
)
_LORA = re.compile(
    rf"{_PREFIX}(?P<module>[^ ]+?)\.(?P<matrix>lora_[AB]|lora_embedding_[AB])(?:\.weight)?"
)
# Full weights that PEFT saves along with the factors: a classifier head (modules_to_save), and the
# embeddings when they are trained or resized.
# Searched for, so that a long name takes a time in proportion to its length.
_HEAD = re.compile(r"(?:\A|[^ ]\.)(?:score|classifier)(?:\Z|\.[^ ])")
_HEAD_SUFFIX = re.compile(r"\.(?:weight|bias)\Z")
_EMBEDDINGS = re.compile(r"(?:\A|[^ ]\.)(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight\Z")

# Names that wrappers put into the path of every parameter: torch.compile, FSDP, activation
# checkpointing and, in front of everything, DataParallel and DeepSpeed.
_WRAPPER_NAMES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPER_PREFIX = "module."
# PEFT's own name of an adapter, which `save_pretrained` leaves out and `state_dict` does not.
_ADAPTER_NAME = re.compile(
    r"(?P<matrix>\.lora_(?:embedding_)?[AB])\.(?!(?:weight|bias)$)[^. ]+(?=\.weight$)"
    r"|(?P<parameter>\.lora_embedding_[AB])\.(?!(?:weight|bias)$)[^. ]+$"
)

_WRAPPERS: tuple[tuple[Kind, re.Pattern[str]], ...] = (("inner", _INNER), ("outer", _OUTER))
# kind, pattern, what the container's name lacks, for tensors of how many dimensions
_EXPERT_STACKS: tuple[tuple[Kind, re.Pattern[str], str, range], ...] = (
    ("parameter", _PARAMETER, ".experts", range(10)),
    ("native", _NATIVE, "", range(10)),
    ("stacked", _STACKED, "", range(10)),
    ("stacked", _DENSE_NAME, ".experts", range(3, 4)),
)


class ExpertKey(NamedTuple):
    """A tensor that belongs to routed experts; a tuple for speed, like TensorEntry.

    module: the experts container without PEFT's prefix, e.g. `model.layers.3.mlp.experts`.
    projection: None where the name does not say (kinds inner and outer).
    expert: None where the tensor holds several experts.
    """

    kind: Kind
    module: str
    projection: Projection | None
    matrix: Matrix
    expert: int | None


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A LoRA factor of a module that every rank needs. `embedding` factors are transposed."""

    module: str
    matrix: Matrix
    embedding: bool


@dataclass(frozen=True, slots=True)
class FullWeightKey:
    """A whole weight that every rank gets as well: a classifier head or embeddings."""


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """A name that no known writer uses; `reason` says what is odd about it, `hint` what to do.

    rule: what it would be to go on without the tensor, where that is known.
    """

    reason: str
    hint: str = "docs/adapter-layouts.md lists the layouts that lorashard reads."
    rule: Rule | None = None


ParsedKey = ExpertKey | LoraKey | FullWeightKey | UnknownKey


def clean_name(name: str) -> str:
    """The name without what wrappers and the name of the adapter add; most names stay as they are.

    `_orig_mod.base_model.model.model.layers.0.q_proj.lora_A.default.weight` becomes
    `base_model.model.model.layers.0.q_proj.lora_A.weight`.
    """
    for wrapper in _WRAPPER_NAMES:
        if wrapper in name:
            parts = name.split(".")
            name = ".".join(part for part in parts if f"{part}." not in _WRAPPER_NAMES)
    while name.startswith(_WRAPPER_PREFIX):
        name = name[len(_WRAPPER_PREFIX) :]
    if not name.endswith((".lora_A.weight", ".lora_B.weight")):
        name = _ADAPTER_NAME.sub(lambda match: match["matrix"] or match["parameter"], name)
    return name


def is_unsloth_alias(module: str) -> bool:
    """Whether a module has the name under which Unsloth keeps fused experts: `moe`, for `experts`.

    unsloth-zoo saving_utils.py; Gemma 4's block in transformers 4 is called that.
    """
    parts = module.removesuffix(".base_layer").split(".")
    return parts[-1] == "moe"


def parse_key(name: str, num_dims: int) -> ParsedKey:
    """Say what a tensor name means. Expert ids are integers, never strings to sort by."""
    name = clean_name(name)
    # The first pattern matches nearly every key of a per-expert adapter, so it comes first.
    if match := _EXPERT.fullmatch(name):
        module, expert, leaf, matrix = match.groups()
        return _expert_key("expert", module, leaf, matrix, int(expert))
    if match := _PROJECTION_LIST.fullmatch(name):
        module, leaf, expert, matrix = match.groups()
        return _expert_key("expert", module, leaf, matrix, int(expert))
    for kind, pattern in _WRAPPERS:
        if match := pattern.fullmatch(name):
            return ExpertKey(kind, match["module"], None, _MATRICES[match["matrix"]], None)
    for kind, pattern, suffix, dims in _EXPERT_STACKS:
        if num_dims in dims and (match := pattern.fullmatch(name)):
            module, leaf, matrix = match.group("module", "projection", "matrix")
            return _expert_key(kind, module + suffix, leaf, matrix, None)
    return _foreign_key(name.split(".")) or _parse_other(name, num_dims)


def _expert_key(kind: Kind, module: str, leaf: str, matrix: str, expert: int | None) -> ParsedKey:
    projection = _PROJECTIONS.get(leaf)
    if projection is None:
        return UnknownKey(f"an expert projection called {leaf!r}")
    return ExpertKey(kind, module, projection, _MATRICES[matrix], expert)


def _foreign_key(parts: list[str]) -> UnknownKey | None:
    """A name of something that is no PEFT adapter of a model that vLLM has."""
    if "adapter" in parts and not {"linear_in", "linear_out"}.isdisjoint(parts):
        return UnknownKey(
            "Megatron's own way of naming an adapter",
            "Export it in PEFT's format with Megatron-Bridge (save_hf_adapter, export_adapter).",
        )
    if "deepspeed_moe" in parts or "deepspeed_experts" in parts:
        return UnknownKey(
            "a MoE layer of DeepSpeed", "vLLM has no model with DeepSpeed's MoE layers."
        )
    return None


def _parse_other(name: str, num_dims: int) -> ParsedKey:
    for marker, reason in (
        ("lora_magnitude_vector", "DoRA"),
        (".lora_A.bias", "a LoRA bias"),
        (".lora_B.bias", "a LoRA bias"),
        ("trainable_tokens", "trainable tokens"),
    ):
        if marker in name:
            return UnknownKey(reason, rule=UNSUPPORTED_VARIANTS)
    if "experts" in name.split("."):
        return UnknownKey("this way of naming expert tensors")
    if match := _LORA.fullmatch(name):
        if num_dims != 2:
            return UnknownKey(f"a LoRA factor with {num_dims} dimensions outside of experts")
        return LoraKey(match["module"], _MATRICES[match["matrix"]], "embedding" in match["matrix"])
    if _is_full_weight(name):
        return FullWeightKey()
    return UnknownKey("a tensor other than a LoRA factor", rule=UNSUPPORTED_VARIANTS)


def _is_full_weight(name: str) -> bool:
    if " " in name:
        return False
    suffix = _HEAD_SUFFIX.search(name)
    is_head = suffix is not None and _HEAD.search(name[: suffix.start()]) is not None
    return is_head or _EMBEDDINGS.search(name) is not None
