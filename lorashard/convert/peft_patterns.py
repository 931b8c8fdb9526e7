"""The r or alpha of every module -> rank_pattern or alpha_pattern, by PEFT's rule. Pure.

PEFT's rule (`get_pattern_key`): a key is a regular expression for the end of a module's name, from a
dot on; of the keys that match, the first one counts. Without a match the config's `r` or
`lora_alpha` counts. A parameter's name is "<module>.<parameter>".

The result has the patterns of the experts first, as few as will do; then one for each other module
whose value the source's patterns would no longer give; then those of the source's patterns that
other modules had their value from, in the source's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lorashard.adapter.name_patterns import NamePatterns

_EXPERT_NAME = re.compile(r"(?P<block>(?:.*\.)?)experts(?P<expert>(?:\.\d+)?)\.(?P<leaf>\w+)")

_Value = TypeVar("_Value", int, float)


def write_patterns(
    experts: Mapping[str, _Value],
    others: Mapping[str, _Value],
    source_names: Mapping[str, str],
    source_patterns: Mapping[str, _Value],
    default: _Value,
) -> dict[str, _Value]:
    """Patterns under which every module has its value. Their order has a meaning.

    experts, others: name -> value, of the experts' modules or parameters and of all others.
    source_names: the name of each of the others that the source's patterns were matched against,
    which is another one where a module becomes a parameter or was one.
    """
    in_use = _patterns_in_use(source_patterns, source_names.values())
    given = _patterns(in_use)
    by_name = {
        re.escape(name): value
        for name, value in others.items()
        if given.first_match(name, default) != value
    }
    after_experts = by_name | {key: v for key, v in in_use.items() if key not in by_name}
    patterns = _expert_patterns(experts, after_experts, default) | after_experts
    written = _patterns(patterns)
    for name, value in others.items():
        assert written.first_match(name, default) == value, name
    return patterns


def _patterns_in_use(patterns: Mapping[str, _Value], names: Iterable[str]) -> dict[str, _Value]:
    """Those of the patterns that are the first to match one of the names."""
    places = _patterns({key: place for place, key in enumerate(patterns)})
    in_use = {places.first_match(name, -1) for name in set(names)}
    return {key: value for place, (key, value) in enumerate(patterns.items()) if place in in_use}


def _patterns(values: Mapping[str, _Value]) -> NamePatterns[_Value]:
    return NamePatterns(values, "rank_pattern or alpha_pattern", "adapter_config.json")


def _expert_patterns(
    experts: Mapping[str, _Value], later: Mapping[str, _Value], default: _Value
) -> dict[str, _Value]:
    """A pattern for each group of experts to which the `later` ones and `default` give another value."""
    by_leaf: dict[str, list[str]] = {}
    for name in experts:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    patterns: dict[str, _Value] = {}
    caught = _patterns(dict.fromkeys(later, 1))
    for same_leaf in by_leaf.values():
        for pattern, names in _group_by_value(same_leaf, experts).items():
            value = experts[names[0]]
            is_caught_later = any(caught.first_match(name, 0) for name in names)
            if is_caught_later or value != default:
                patterns[pattern] = value
    return patterns


def _group_by_value(names: Sequence[str], values: Mapping[str, _Value]) -> dict[str, list[str]]:
    """The coarsest groups with one value each, by the pattern that matches just their names."""
    groups: dict[str, list[str]] = {}
    for one_block, one_expert in ((False, False), (False, True), (True, False), (True, True)):
        groups = {}
        for name in names:
            pattern = _pattern_like(name, one_block=one_block, one_expert=one_expert)
            groups.setdefault(pattern, []).append(name)
        if all(len({values[name] for name in group}) == 1 for group in groups.values()):
            break
    return groups


def _pattern_like(name: str, *, one_block: bool, one_expert: bool) -> str:
    """A pattern for an expert's projection or a fused parameter, in all blocks or for all experts."""
    match = _EXPERT_NAME.fullmatch(name)
    assert match, name
    block = re.escape(match["block"]) if one_block else ""
    expert = re.escape(match["expert"]) if one_expert or not match["expert"] else r"\.\d+"
    return rf"{block}experts{expert}\.{match['leaf']}"
