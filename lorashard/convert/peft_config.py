"""What an adapter trains -> the adapter_config.json with which PEFT gives it that. Pure.

PEFT takes three things from it: which modules and parameters to wrap (target_modules,
target_parameters), the r and the alpha of each (patterns, the first that matches wins), and how
scaling follows from them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lorashard.adapter.config import LoraConfig, first_match, matches_pattern
from lorashard.convert.peft_tensors import PeftLayout

# What other writers say about the layout that is left behind.
_LAYOUT_MARKERS = ("lora_B_layout", "unsloth_fused_expert_lora")
# PEFT >= 0.19 takes these in target_modules for the routed experts, or their router, also where
# another module is meant (`_MOE_TARGET_MODULE_MAPPING`), so there they are named as parameters.
_REROUTED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_ROUTERS = frozenset({"gate", "router"})

_EXPERT_NAME = re.compile(r"(?P<block>(?:.*\.)?)experts(?P<expert>(?:\.\d+)?)\.(?P<leaf>\w+)")

_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, slots=True)
class Setting:
    """The r and the alpha of one module; name: what PEFT's patterns are matched against."""

    name: str
    lora_rank: int
    alpha: float


def write_config(
    source: Mapping[str, Any],
    config: LoraConfig,
    layout: PeftLayout,
    experts: Sequence[Setting],
    others: Sequence[str],
) -> dict[str, Any]:
    """The new adapter_config.json.

    source, config: the source's, as JSON and read. experts: at least one.
    others: names of the modules beside the experts that have factors.
    """
    was_parameter = _parameters(config.target_parameters, others)
    names = [setting.name for setting in experts]
    modules, parameters, filters = _targets_of_others(source, layout, others, was_parameter, names)
    modules += _expert_modules(experts) if layout == "per_expert" else ()
    parameters += _expert_parameters(experts) if layout == "fused" else ()
    kept = {
        (f"{name}.weight" if name in parameters or _named_by(parameters, name) else name): Setting(
            told := f"{name}.weight" if name in was_parameter else name,
            config.rank_of(told),
            config.alpha_of(told),
        )
        for name in others
    }
    lora_rank, alpha = config.lora_rank, config.lora_alpha
    if not others:
        ((lora_rank, alpha), _), *_ = Counter((e.lora_rank, e.alpha) for e in experts).most_common()
    new = {name: value for name, value in source.items() if name not in _LAYOUT_MARKERS}
    if parameters:
        new |= {"lora_dropout": 0.0, "fan_in_fan_out": False}  # all that PEFT takes for parameters
    if layout == "fused" and not config.saved_by_peft:
        new["loftq_config"] = {}  # PEFT's default; says that PEFT's order of columns is meant
    return (
        {"peft_type": "LORA", "inference_mode": True}
        | new
        | filters
        | {
            "r": lora_rank,
            "lora_alpha": alpha,
            "use_rslora": config.use_rslora,
            "bias": "none",
            # What is targeted and not in the file must be zero, not random.
            "init_lora_weights": True,
            "rank_pattern": _patterns(
                {e.name: e.lora_rank for e in experts},
                {name: (told.name, told.lora_rank) for name, told in kept.items()},
                config.rank_pattern,
                lora_rank,
            ),
            "alpha_pattern": _patterns(
                {e.name: e.alpha for e in experts},
                {name: (told.name, told.alpha) for name, told in kept.items()},
                config.alpha_pattern,
                alpha,
            ),
            "target_modules": list(modules),
            "target_parameters": list(parameters) or None,
        }
    )


def _named_by(targets: Sequence[str], module: str) -> bool:
    """Whether a target parameter is the weight of this module."""
    weight = f"{module}.weight"
    return any(weight == target or weight.endswith(f".{target}") for target in targets)


def _parameters(targets: Sequence[str], modules: Sequence[str]) -> frozenset[str]:
    return frozenset(module for module in modules if _named_by(targets, module))


def _targets_of_others(
    source: Mapping[str, Any],
    layout: PeftLayout,
    others: Sequence[str],
    was_parameter: frozenset[str],
    experts: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Target modules and parameters for what is no expert, and the fields that filter them.

    The source's own entries where they are plain names that still mean the same; else full names.
    """
    parameters: list[str] = []
    left: list[str] = []
    for name in others:
        leaf = name.rpartition(".")[2]
        rerouted = layout == "fused" and leaf in _REROUTED
        # A router can be either, nn.Linear or a parameter of its own; as a parameter it is both.
        unsure = leaf in _ROUTERS and not _is_target(source.get("target_modules"), name)
        if rerouted or unsure or name in was_parameter:
            # transformers 5 calls the blocks of some models otherwise, so routers go by their own.
            parameters.append(f"{leaf if leaf in _ROUTERS else name}.weight")
        else:
            left.append(name)
    filters: dict[str, Any] = dict.fromkeys(
        ("exclude_modules", "layers_to_transform", "layers_pattern")
    )
    told, excluded = source.get("target_modules"), source.get("exclude_modules")
    plain: list[str] = []
    misled = any(_is_target(excluded, name) for name in experts)
    if isinstance(told, list) and source.get("layers_to_transform") is None and not misled:
        plain = [
            target
            for target in told
            if isinstance(target, str)
            and target.rpartition(".")[2] not in _REROUTED
            and any(_ends(name, target) for name in left)
        ]
    if plain:
        filters["exclude_modules"] = excluded
    full = [name for name in left if not any(_ends(name, target) for target in plain)]
    filters = {name: value for name, value in filters.items() if name in source}
    return (*sorted(plain), *full), tuple(dict.fromkeys(parameters)), filters


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_target(targets: Any, name: str) -> bool:
    """PEFT's rule for target_modules and exclude_modules: a pattern, or a list of name ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends(name, str(target)) for target in targets or ())


def _expert_modules(experts: Sequence[Setting]) -> tuple[str, ...]:
    """By expert and projection; the container too where containers train different ones."""
    by_container: dict[str, list[str]] = {}
    for setting in experts:
        container, expert, leaf = setting.name.rsplit(".", 2)
        by_container.setdefault(container, []).append(f"experts.{expert}.{leaf}")
    first = set(next(iter(by_container.values())))
    if all(set(names) == first for names in by_container.values()):
        return tuple(dict.fromkeys(name for names in by_container.values() for name in names))
    return tuple(setting.name for setting in experts)


def _expert_parameters(experts: Sequence[Setting]) -> tuple[str, ...]:
    """`experts.gate_up_proj` and its like; in full where containers train different ones.

    There the suffix would wrap a second parameter, and PEFT's keys would then mean others.
    """
    by_container: dict[str, list[str]] = {}
    for setting in experts:
        container, _, role = setting.name.rpartition(".")
        by_container.setdefault(container, []).append(f"experts.{role}")
    first, *rest = by_container.values()
    if all(names == first for names in rest):
        return tuple(first)
    return tuple(setting.name for setting in experts)


def _patterns(
    experts: Mapping[str, _Value],
    others: Mapping[str, tuple[str, _Value]],
    source: Mapping[str, _Value],
    default: _Value,
) -> dict[str, _Value]:
    """Patterns under which every module has its value; those of the experts first.

    others: name -> (the name that the source's patterns saw, value).
    """
    kept: dict[str, _Value] = {}
    for seen, _ in others.values():
        key = next((key for key in source if matches_pattern(key, seen)), None)
        if key is not None:
            kept[key] = source[key]
    kept = {key: kept[key] for key in source if key in kept}
    exact: dict[str, _Value] = {}
    for name, (_, value) in others.items():
        if first_match(kept, name, default) != value:
            exact[re.escape(name)] = value
    rest = exact | {key: value for key, value in kept.items() if key not in exact}
    patterns = _expert_patterns(experts, rest, default) | rest
    for name, (_, value) in others.items():
        assert first_match(patterns, name, default) == value, name
    return patterns


def _expert_patterns(
    experts: Mapping[str, _Value], rest: Mapping[str, _Value], default: _Value
) -> dict[str, _Value]:
    """One pattern for each group of experts that `rest` and `default` would not give its value."""
    by_leaf: dict[str, list[str]] = {}
    for name in experts:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    patterns: dict[str, _Value] = {}
    for names in by_leaf.values():
        for pattern, group in _groups(names, experts):
            value = experts[group[0]]
            misled = any(matches_pattern(key, name) for key in rest for name in group)
            if misled or value != default:
                patterns[pattern] = value
    return patterns


def _groups(names: Sequence[str], values: Mapping[str, _Value]) -> Iterator[tuple[str, list[str]]]:
    """The coarsest groups with one value each, and the pattern that matches just these."""
    grouped: dict[str, list[str]] = {}
    for one_block, one_expert in ((False, False), (False, True), (True, False), (True, True)):
        grouped = {}
        for name in names:
            key = _pattern(name, one_block=one_block, one_expert=one_expert)
            grouped.setdefault(key, []).append(name)
        if all(len({values[name] for name in group}) == 1 for group in grouped.values()):
            break
    yield from grouped.items()


def _pattern(name: str, *, one_block: bool, one_expert: bool) -> str:
    """A pattern for the name of an expert's projection or a fused parameter."""
    match = _EXPERT_NAME.fullmatch(name)
    assert match, name
    block = re.escape(match["block"]) if one_block else ""
    expert = re.escape(match["expert"]) if one_expert or not match["expert"] else r"\.\d+"
    return rf"{block}experts{expert}\.{match['leaf']}"
