"""Which MoE layer of the engine takes which experts of the adapter, and how. Pure.

In: what an adapter has, the live layers, and how the engine maps names. Out: a `MatchedLayer` for
each layer that the adapter trains, or a LayoutError that says why the engine cannot take it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from lorashard.errors import LayoutError
from lorashard.rules import RENAMED_EXPERTS
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.assembly import Assembly, plan_assembly
from lorashard.vllm_plugin.load.contents import AdapterContents, ModuleContents
from lorashard.vllm_plugin.load.rests import rest_if_due
from lorashard.vllm_plugin.load.rows import Run, find_runs


class LayerNames(Protocol):
    """How names in an adapter map to names in the engine (`engine.names.ModuleNames`)."""

    def is_elsewhere(self, module: str) -> bool:
        """Whether a module belongs to another pipeline stage, or the engine leaves it out."""

    def moe_module(self, module: str, live: Collection[str]) -> str | None:
        """The name of the live layer that takes an experts container, or None."""


@dataclass(frozen=True, slots=True)
class MatchedLayer:
    """A live MoE layer, the experts container of the adapter that it takes, and how they fit.

    runs: which slots of which rank files this rank's experts come from.
    """

    live: LiveExperts
    contents: ModuleContents
    assembly: Assembly
    runs: tuple[Run, ...]


def match_layers(
    contents: AdapterContents, layers: Mapping[str, LiveExperts], names: LayerNames
) -> tuple[MatchedLayer, ...]:
    """Match each experts container with its live layer, in the order of `layers`.

    layers: the engine's MoE layers on this rank, by name. Raises LayoutError for a container that
    no layer takes, or that does not fit the one that does; PlacementError for an expert of this
    rank that no rank file holds.
    """
    matched: dict[str, MatchedLayer] = {}
    for module in contents.modules:
        if names.is_elsewhere(module.name):
            continue
        live = _layer_of(module, layers, names)
        if contents.num_experts != live.num_experts:
            raise LayoutError(
                f"{module.name}: the adapter has {contents.num_experts} experts, "
                f"{live.name} has {live.num_experts}.",
                hint="Is the adapter for this model? `lorashard split --model` checks that.",
            )
        if live.name in matched:
            other = matched[live.name].contents.name
            raise LayoutError(f"{other} and {module.name} both belong to {live.name}.")
        matched[live.name] = _match(module, live, gate_up_known=contents.gate_up_known)
        rest_if_due()
    return tuple(matched[name] for name in layers if name in matched)


def _layer_of(
    module: ModuleContents, layers: Mapping[str, LiveExperts], names: LayerNames
) -> LiveExperts:
    name = names.moe_module(module.name, layers)
    if name is None:
        raise LayoutError(
            f"{module.name}: the model has no MoE layer for this module of the adapter.",
            hint="Is the adapter for this model?",
            rule=RENAMED_EXPERTS,
        )
    return layers[name]


def _match(module: ModuleContents, live: LiveExperts, *, gate_up_known: bool) -> MatchedLayer:
    gate_up = module.gate_up
    has_rows_of_both = any(stack.projection == "gate_up_proj" for stack in module.stacks)
    if has_rows_of_both and gate_up in ("concatenated", "interleaved"):
        gate_up = "interleaved" if live.interleaved else "concatenated"
        if gate_up_known and gate_up != module.gate_up:
            raise LayoutError(
                f"{module.name}: the shards say that gate and up rows are {module.gate_up}, "
                f"but {live.name} has them {gate_up}.",
                hint="Is the adapter for this model? If it is, split it again with --model.",
            )
    own_file = live.ep_rank if len(module.ranks) == live.ep_size else None
    return MatchedLayer(
        live,
        module,
        plan_assembly(live, module.stacks, gate_up, module.name),
        find_runs(module.ranks, live.local_experts, own_file),
    )
