"""What an adapter says about itself: its PEFT config and its tensor table. Pure values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lorashard.adapter.name_patterns import NamePatterns
from lorashard.adapter.options import LoraBLayout
from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.header import TensorEntry
from lorashard.rules import BASE_CHANGED, FUSED_ORDER, PATTERNS_IGNORED, UNSUPPORTED_VARIANTS
from lorashard.storage.small_files import load_writable_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

# Initialisations that move part of the base weights into the adapter: without the same change to
# the base model the adapter is wrong, and a server does not make that change. PEFT
# `LoraLayer.update_layer`; vLLM 0.33 rejects them too (peft_helper.py:188).
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Layers that compute something other than x + scaling * B A x.
_LORA_VARIANTS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
# What PEFT saves for sequence classification.
_CLASSIFIER_HEADS = frozenset({"classifier", "score"})

_MAX_NUMBER = 10**9  # for a rank or an alpha; far above any real one

_CONVERT = "Train without it, or merge the adapter into the base model with PEFT."


_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields of adapter_config.json that decide what the tensors mean.

    moe_rank_scaling: whether the writer (NeMo AutoModel) gave experts a lower r than the config's.
    A module to which rank_pattern gives r=0 has empty factors and is not trained.
    """

    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: NamePatterns[int]
    alpha_pattern: NamePatterns[float]
    target_parameters: tuple[str, ...]
    lora_b_layout: LoraBLayout | None
    saved_by_peft: bool
    moe_rank_scaling: bool
    base_model: str | None
    base_model_class: str | None

    def rank_of(self, module: str) -> int:
        """The r that PEFT gives the module of this name (no PEFT prefix)."""
        return self.rank_pattern.first_match(module, self.lora_rank)

    def states_rank_of(self, module: str) -> bool:
        """Whether rank_pattern has an r for the module of this name."""
        return self.rank_pattern.first_match(module, -1) >= 0

    def alpha_of(self, module: str) -> float:
        """The alpha that PEFT gives the module of this name (no PEFT prefix)."""
        return self.alpha_pattern.first_match(module, self.lora_alpha)

    def scaling_of(self, module: str, lora_rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) with rsLoRA, as PEFT `LoraLayer.update_layer`.

        Raises AdapterError if alpha is 0, which only a module with r=0 may have.
        """
        alpha = self.alpha_of(module)
        if alpha == 0:
            raise AdapterError(
                f"{module} has r={lora_rank}, but alpha_pattern gives it an alpha of 0.",
                hint=f"State its alpha in {CONFIG_NAME}.",
                rule=PATTERNS_IGNORED,
            )
        return alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)


@dataclass(frozen=True, slots=True)
class AdapterIndex:
    """One adapter: its config and which bytes of its one weights file are which tensor.

    `tensors` are in file order and tile [data_begin, file_size).
    """

    config: LoraConfig
    tensors: tuple[TensorEntry, ...]
    data_begin: int
    file_size: int


def parse_config(raw: bytes, where: str) -> LoraConfig:
    """Read adapter_config.json. Raises AdapterError if it is damaged or uses what is not supported."""
    try:
        config = load_writable_json(raw)
    except (ValueError, RecursionError) as err:
        raise _damaged(where, f"not JSON ({err})") from err
    if not isinstance(config, dict):
        raise _damaged(where, "not a JSON object")
    _refuse_unsupported(config, where)
    for field in ("target_modules", "exclude_modules"):
        _check_targets(config.get(field), field, where)
    auto_mapping = config.get("auto_mapping")
    base_class = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    base_model = config.get("base_model_name_or_path")
    return LoraConfig(
        lora_rank=_positive_int(config.get("r"), "r", where),
        lora_alpha=_positive_number(config.get("lora_alpha"), "lora_alpha", where),
        use_rslora=_flag(config.get("use_rslora"), "use_rslora", where),
        rank_pattern=_patterns(config, "rank_pattern", _count, where),
        alpha_pattern=_patterns(config, "alpha_pattern", _alpha_check(config), where),
        target_parameters=_strings(config.get("target_parameters"), "target_parameters", where),
        lora_b_layout=_lora_b_layout(config, where),
        # Other writers of adapter_config.json leave these two fields out, as far as seen.
        saved_by_peft="peft_version" in config or "loftq_config" in config,
        moe_rank_scaling=_flag(config.get("moe_rank_scaling"), "moe_rank_scaling", where),
        base_model=base_model if isinstance(base_model, str) else None,
        base_model_class=base_class if isinstance(base_class, str) else None,
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    peft_type, bias = config.get("peft_type", "LORA"), config.get("bias") or "none"
    init = config.get("init_lora_weights")
    saved = _strings(config.get("modules_to_save"), "modules_to_save", where)
    beyond = [name for name in saved if name.rpartition(".")[2] not in _CLASSIFIER_HEADS]
    if "lora_parameters" in config and "r" not in config:
        raise UnsupportedAdapterError(
            "MLX's own format",
            where,
            hint="lorashard reads PEFT's format; convert the adapter first.",
        )
    refusals: list[tuple[object, str, str]] = [
        (str(peft_type).upper() != "LORA", f"peft_type {peft_type!r}", "Only LoRA can be split."),
        (config.get("use_dora"), "DoRA (use_dora)", _CONVERT),
        (bias != "none", f"trained bias (bias={bias!r})", 'Train with bias="none".'),
        (config.get("lora_bias"), "lora_bias", "Train with lora_bias=False."),
        (config.get("trainable_token_indices"), "trainable_token_indices", _CONVERT),
        (config.get("layer_replication"), "layer_replication", _CONVERT),
        (beyond, f"modules_to_save {beyond}", "Only a classifier head can be kept."),
        *((config.get(name), f"the LoRA variant {name}", _CONVERT) for name in _LORA_VARIANTS),
    ]  # fmt: skip
    for present, feature, hint in refusals:
        if present:
            raise UnsupportedAdapterError(feature, where, hint=hint, rule=UNSUPPORTED_VARIANTS)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UnsupportedAdapterError(
            f"init_lora_weights={init!r}, which changes the base weights,",
            where,
            hint="Save with path_initial_model_for_weight_conversion, which turns it into a plain LoRA.",
            rule=BASE_CHANGED,
        )


def _patterns(
    config: Mapping[str, Any],
    field: str,
    check: Callable[[Any, str, str], _Number],
    where: str,
) -> NamePatterns[_Number]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _damaged(where, f"{field} is not an object")
    values = {key: check(value, f"{field} {key!r}", where) for key, value in patterns.items()}
    try:
        return NamePatterns(values, field, where)
    except (re.error, OverflowError, RecursionError) as err:
        raise _damaged(where, f"{field}: a key is not a regular expression ({err})") from err


def _alpha_check(config: Mapping[str, Any]) -> Callable[[Any, str, str], float]:
    """A number > 0; or 0, as mergekit writes it, for the key to which rank_pattern gives r=0."""
    untrained = {
        f"alpha_pattern {key!r}"
        for key, lora_rank in (config.get("rank_pattern") or {}).items()
        if lora_rank == 0
    }

    def check(value: Any, field: str, where: str) -> float:
        if field in untrained and type(value) in (int, float) and value == 0:
            return 0.0
        return _positive_number(value, field, where)

    return check


def _count(value: Any, field: str, where: str) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise _damaged(where, f"{field} is {_shown(value)}, not an integer >= 0")
    return value


def _positive_int(value: Any, field: str, where: str) -> int:
    if type(value) is not int or not 0 < value < _MAX_NUMBER:
        raise _damaged(where, f"{field} is {_shown(value)}, not an integer >= 1")
    return value


def _positive_number(value: Any, field: str, where: str) -> float:
    if type(value) in (int, float) and value == 0:
        raise AdapterError(
            f"{where}: {field} is {_shown(value)}, not a number > 0, so the scaling is not known.",
            hint=f"Write the {field} of the training into {CONFIG_NAME}. verl leaves 0 there for "
            "you to replace.",
        )
    if type(value) not in (int, float) or not 0 < value < _MAX_NUMBER:
        raise _damaged(where, f"{field} is {_shown(value)}, not a number > 0")
    number: float = value
    return number


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:40]
    except (RecursionError, ValueError):  # nested as deeply as can be read, or of 4,300 digits
        return "too deep or too long"


def _flag(value: Any, field: str, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _damaged(where, f"{field} is {value!r}, not true or false")
    return bool(value)


def _check_targets(value: Any, field: str, where: str) -> None:
    """A regular expression, or a list of ends of names."""
    if not isinstance(value, str):
        _strings(value, field, where)
        return
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as err:
        raise _damaged(where, f"{field} is not a regular expression ({err})") from err


def _strings(value: Any, field: str, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise _damaged(where, f"{field} is not a list of names")
    return tuple(values)


def _damaged(where: str, reason: str) -> AdapterError:
    return AdapterError(f"{where}: {reason}.", hint="Save the adapter again.")


def _lora_b_layout(config: Mapping[str, Any], where: str) -> LoraBLayout | None:
    layout: LoraBLayout | None = config.get("lora_B_layout")
    if layout not in (None, "rank_major", "grouped_by_expert"):
        raise UnsupportedAdapterError(
            f"lora_B_layout {layout!r}",
            where,
            hint="Known: rank_major, grouped_by_expert.",
            rule=FUSED_ORDER,
        )
    return layout
