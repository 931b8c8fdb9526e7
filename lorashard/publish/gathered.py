"""The adapter that the ranks have together, as `save_pretrained` would write it; and its shards. Pure.

In: config and tensors. Out: the header of its weights file, what its tensors mean, and the plan of
the shard directory that `split` would write of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorashard.adapter.base_model import ModelFacts, merge_facts
from lorashard.adapter.config import AdapterIndex, parse_config
from lorashard.adapter.keys import PEFT_PREFIX
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.errors import LayoutError
from lorashard.header import build_header
from lorashard.shards.placement import Placement, place_experts
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.vllm_options import Strategy

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Serving:
    """How the adapter is to be served. facts: of the base model's config, if it is named.

    expert_map: parsed JSON of an explicit placement; it overrides `strategy`.
    """

    ep_size: int
    strategy: Strategy
    expert_map: object
    options: LayoutOptions
    facts: ModelFacts | None


@dataclass(frozen=True, slots=True)
class GatheredAdapter:
    """An adapter that is nowhere as a whole. header: its weights file, up to the data."""

    header: bytes
    index: AdapterIndex
    options: LayoutOptions
    layout: AdapterLayout
    placement: Placement
    plan: ShardPlan


def plan_gathered(
    config: bytes, tensors: Mapping[str, tuple[str, tuple[int, ...]]], serving: Serving, where: str
) -> GatheredAdapter:
    """Decide every byte of the shard directory. tensors: dtype and shape by name.

    Raises AdapterError, or LayoutError for experts that no rank has.
    """
    header, entries = build_header(
        ((name, dtype, shape) for name, (dtype, shape) in tensors.items()), {"format": "pt"}
    )
    file_size = entries[-1].end if entries else len(header)
    index = AdapterIndex(parse_config(config, where), entries, len(header), file_size)
    options = merge_facts(serving.options, serving.facts)
    layout = detect_layout(index, options, where)
    _refuse_gaps(layout)
    placement = place_experts(layout, serving.ep_size, serving.strategy, serving.expert_map)
    plan = build_plan(layout, placement, None)
    options = replace(options, num_experts=layout.num_experts)
    return GatheredAdapter(header, index, options, layout, placement, plan)


def _refuse_gaps(layout: AdapterLayout) -> None:
    """Raise LayoutError for an expert that no rank has given."""
    for module in layout.modules:
        for stack in module.stacks:
            if stack.shared:
                continue
            given = {expert for source in stack.sources for expert in source.experts or ()}
            missing = sorted(set(range(layout.num_experts)) - given)
            if missing:
                shown = ", ".join(map(str, missing[:_SHOWN])) + ", …" * (len(missing) > _SHOWN)
                raise LayoutError(
                    f"{stack.module}: no rank has {stack.projection} {stack.matrix} of expert "
                    f"{shown} ({len(missing)} of {layout.num_experts}).",
                    hint="Every expert must be given to the writer, on some rank.",
                )


def format_config(config: Mapping[str, Any]) -> bytes:
    """adapter_config.json as PEFT writes it; the same on every rank, also where it has sets."""

    def plain(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        return getattr(value, "value", None) or str(value)  # an enum, or a path

    return json.dumps(dict(config), indent=2, sort_keys=True, default=plain).encode()


def expert_names(module: str, expert: int, projection: str) -> tuple[str, str]:
    """What PEFT calls lora_A and lora_B of an expert's linear layer."""
    return dense_names(f"{module}.{expert}.{projection}")


def dense_names(module: str) -> tuple[str, str]:
    """What PEFT calls lora_A and lora_B of a linear layer. module: with or without PEFT's prefix."""
    name = PEFT_PREFIX + module.removeprefix(PEFT_PREFIX)
    return (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
