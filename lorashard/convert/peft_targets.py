"""What PEFT is to wrap -> target_modules, target_parameters, and the fields that filter them. Pure.

PEFT's rules (0.21 `check_target_module_exists`, `_inject_parameters`):

- target_modules is a regular expression for a module's whole name, or a list of ends of names: an
  entry "q_proj" is every module of that name, a full name just the one.
- exclude_modules, in the same two forms, takes modules out again, and layers_to_transform with
  layers_pattern takes out those of other layers. Both filter target_modules alone.
- target_parameters is a list of ends of parameter names. A module's weight may be wrapped as the
  parameter "<module>.weight": its tensors have the same keys as if the module were wrapped.
- Where transformers 5 has fused the experts of a model, PEFT >= 0.19 replaces the entries of
  target_modules that end in `gate`, `up_proj` and so on by the fused parameters
  (`_MOE_TARGET_MODULE_MAPPING`), whichever module they were meant for.

So modules are named in full, unless an entry of the source's target_modules is still good: it may
cover modules without tensors, as it did before, and PEFT gives those factors that are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorashard.adapter.name_patterns import NamePattern
from lorashard.adapter.options import ExpertLayout

_FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")

# PEFT >= 0.19 takes these for the routed experts or their router (the last rule above).
_REPLACED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_ROUTERS = frozenset({"gate", "router"})


@dataclass(frozen=True, slots=True)
class PeftTargets:
    """The entries of target_modules and target_parameters.

    filters: the fields of the source that filter target_modules, with their new values.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    filters: Mapping[str, Any]


def choose_targets(
    source: Mapping[str, Any],
    layout: ExpertLayout,
    experts: Sequence[str],
    others: Sequence[str],
    former_parameters: frozenset[str],
) -> PeftTargets:
    """Target all of `experts` and `others`.

    source: the source's adapter_config.json. Its entries of target_modules are kept where they are
    plain names that still mean the same; otherwise the others are named in full.
    experts: names of the experts' projections, or of the fused parameters.
    others: names of all other modules that have tensors. former_parameters: those of them whose
    weight is in the source's target_parameters.
    """
    as_modules, as_parameters = [], []
    for name in others:
        if name in former_parameters or _must_be_parameter(source, layout, name):
            as_parameters.append(name)
        else:
            as_modules.append(name)
    kept_entries = _entries_to_keep(source, as_modules, experts)
    in_full = [name for name in as_modules if not _ends_with_any(name, kept_entries)]
    modules = [*sorted(kept_entries), *in_full]
    parameters = list(dict.fromkeys(map(_parameter_entry, as_parameters)))
    if layout == "per_expert":
        modules += _expert_modules(experts)
    else:
        parameters += _expert_parameters(experts)
    # Full names need no filter, and layers_to_transform is never kept.
    filters = dict.fromkeys(field for field in _FILTERS if field in source)
    if kept_entries and "exclude_modules" in source:
        filters["exclude_modules"] = source["exclude_modules"]
    return PeftTargets(tuple(modules), tuple(parameters), filters)


def is_target_parameter(target_parameters: Sequence[str], module: str) -> bool:
    """PEFT's rule for target_parameters: whether they name the weight of this module."""
    return _ends_with_any(f"{module}.weight", target_parameters)


def is_target_module(targets: Any, module: str) -> bool:
    """PEFT's rule for target_modules and exclude_modules: a pattern, or a list of ends of names."""
    if isinstance(targets, str):
        return _pattern(targets).matches(module)
    return _ends_with_any(module, [str(target) for target in targets or ()])


@lru_cache(maxsize=8)
def _pattern(targets: str) -> NamePattern:
    return NamePattern(targets, "target_modules or exclude_modules", "adapter_config.json")


def _ends_with_any(name: str, entries: Sequence[str]) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _must_be_parameter(source: Mapping[str, Any], layout: ExpertLayout, module: str) -> bool:
    if layout == "fused" and _leaf(module) in _REPLACED:
        return True
    # A router can be an nn.Linear, or a module of its own kind, which PEFT cannot wrap. As a
    # parameter it can be either; as a module it was one only if the source says so.
    return _leaf(module) in _ROUTERS and not is_target_module(source.get("target_modules"), module)


def _parameter_entry(module: str) -> str:
    # transformers 5 has renamed the blocks of some models, so routers go without their block.
    name = _leaf(module) if _leaf(module) in _ROUTERS else module
    return f"{name}.weight"


def _entries_to_keep(
    source: Mapping[str, Any], modules: Sequence[str], experts: Sequence[str]
) -> list[str]:
    """Those of the source's target_modules that name some of `modules`; none if filters interfere."""
    entries, excluded = source.get("target_modules"), source.get("exclude_modules")
    excludes_experts = any(is_target_module(excluded, name) for name in experts)
    if not isinstance(entries, list) or excludes_experts:
        return []
    if source.get("layers_to_transform") is not None:
        return []
    return [
        entry
        for entry in entries
        if isinstance(entry, str)
        and _leaf(entry) not in _REPLACED
        and any(_ends_with_any(name, [entry]) for name in modules)
    ]


def _expert_modules(experts: Sequence[str]) -> list[str]:
    """`experts.0.up_proj` and its like; in full where containers train different ones."""
    by_container: dict[str, list[str]] = {}
    for name in experts:
        container, expert, leaf = name.rsplit(".", 2)
        by_container.setdefault(container, []).append(f"experts.{expert}.{leaf}")
    first, *rest = by_container.values()
    if all(set(entries) == set(first) for entries in rest):
        return list(dict.fromkeys(first))
    return list(experts)


def _expert_parameters(experts: Sequence[str]) -> list[str]:
    """`experts.gate_up_proj` and its like; in full where containers train different ones.

    There the short name would wrap a second parameter, and the keys of the first would then be
    taken for the second's.
    """
    by_container: dict[str, list[str]] = {}
    for name in experts:
        container, _, parameter = name.rpartition(".")
        by_container.setdefault(container, []).append(f"experts.{parameter}")
    first, *rest = by_container.values()
    return first if all(entries == first for entries in rest) else list(experts)
