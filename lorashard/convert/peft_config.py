"""What an adapter trains -> the adapter_config.json with which PEFT gives it that. Pure.

PEFT takes three things from it:

- which modules and parameters to wrap: target_modules, target_parameters (`peft_targets`);
- the r and the alpha of each: `r`, rank_pattern, lora_alpha, alpha_pattern (`peft_patterns`);
- how scaling follows from those: alpha / r, or alpha / sqrt(r) with use_rslora.

Everything else is the source's, unless it would contradict one of the three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.options import ExpertLayout
from lorashard.convert.peft_patterns import write_patterns
from lorashard.convert.peft_targets import PeftTargets, choose_targets, is_target_parameter

# What other writers say about the layout that is given up.
_LAYOUT_MARKERS = ("lora_B_layout", "unsloth_fused_expert_lora")


@dataclass(frozen=True, slots=True)
class ModuleSetting:
    """The r and the alpha of one module; name: what PEFT matches its patterns against."""

    name: str
    lora_rank: int
    alpha: float


def write_config(
    source: Mapping[str, Any],
    config: LoraConfig,
    layout: ExpertLayout,
    experts: Sequence[ModuleSetting],
    others: Sequence[str],
) -> dict[str, Any]:
    """The new adapter_config.json.

    source, config: the source's, as JSON and parsed. experts: at least one.
    others: names of the modules other than experts that have tensors.
    """
    former_parameters = frozenset(
        name for name in others if is_target_parameter(config.target_parameters, name)
    )
    expert_names = [setting.name for setting in experts]
    targets = choose_targets(source, layout, expert_names, others, former_parameters)
    # New name -> old name, as PEFT matches the new and the old patterns against them.
    source_names: dict[str, str] = {}
    for module in others:
        is_parameter = is_target_parameter(targets.parameters, module)
        name = _name_for_patterns(module, is_parameter=is_parameter)
        source_names[name] = _name_for_patterns(module, is_parameter=module in former_parameters)
    lora_rank, alpha = config.lora_rank, config.lora_alpha
    if not others:
        lora_rank, alpha = _most_common_setting(experts)
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        **_source_fields(source, config, layout, targets),
        **targets.filters,
        "target_modules": list(targets.modules),
        "target_parameters": list(targets.parameters) or None,
        "r": lora_rank,
        "lora_alpha": alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": write_patterns(
            {setting.name: setting.lora_rank for setting in experts},
            {name: config.rank_of(source_name) for name, source_name in source_names.items()},
            source_names,
            config.rank_pattern,
            lora_rank,
        ),
        "alpha_pattern": write_patterns(
            {setting.name: setting.alpha for setting in experts},
            {name: config.alpha_of(source_name) for name, source_name in source_names.items()},
            source_names,
            config.alpha_pattern,
            alpha,
        ),
        "bias": "none",
        # What is targeted and not in the file must be zero, not random.
        "init_lora_weights": True,
    }


def _name_for_patterns(module: str, *, is_parameter: bool) -> str:
    return f"{module}.weight" if is_parameter else module


def _most_common_setting(experts: Sequence[ModuleSetting]) -> tuple[int, float]:
    """The (r, alpha) that most of the experts have, so that the others need the patterns."""
    counts = Counter((setting.lora_rank, setting.alpha) for setting in experts)
    return counts.most_common(1)[0][0]


def _source_fields(
    source: Mapping[str, Any], config: LoraConfig, layout: ExpertLayout, targets: PeftTargets
) -> dict[str, Any]:
    """The source's own fields, changed where PEFT would refuse or misread the new tensors."""
    fields = {field: value for field, value in source.items() if field not in _LAYOUT_MARKERS}
    if targets.parameters:
        # The only values that PEFT accepts for wrapped parameters.
        fields |= {"lora_dropout": 0.0, "fan_in_fan_out": False}
    if layout == "fused" and not config.saved_by_peft:
        # PEFT's default. It marks the file as PEFT's own, in PEFT's order of lora_B's columns.
        fields["loftq_config"] = {}
    return fields
