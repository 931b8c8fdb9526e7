"""Which expert each slot of each MoE layer holds, on all ranks, at one moment of an engine. Pure.

Under --enable-eplb vLLM moves experts between slots. Its names: a slot of any rank is a physical
expert, what it holds a logical one. Slot `i` of ep rank `k` is the physical expert
`k * num_local + i`; with redundant experts several slots hold the same logical one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from lorashard.shards.placement import OF_ENGINE, Ranks
from lorashard.vllm_plugin.engine.live import LiveExperts

Slots = tuple[int, ...]  # the logical expert of each physical one


@dataclass(frozen=True, slots=True)
class ExpertMaps:
    """The maps of one moment. layers: by the module's name, in the order of the model's MoE layers.

    number: how often a layer's map has changed since the start, the same on all ranks.
    """

    layers: Mapping[str, Slots]
    number: int = 0

    def with_layer(self, name: str, slots: Iterable[int]) -> ExpertMaps:
        """The maps once a layer's has changed."""
        layers = dict(self.layers) | {name: tuple(slots)}
        return ExpertMaps(MappingProxyType(layers), self.number + 1)

    def ranks_of(self, name: str, ep_size: int) -> Ranks:
        """The experts of each rank in one layer, in slot order."""
        slots = self.layers[name]
        num_local = len(slots) // ep_size
        return tuple(slots[rank * num_local : (rank + 1) * num_local] for rank in range(ep_size))


def place_layers(
    layers: Mapping[str, LiveExperts], maps: ExpertMaps | None
) -> Mapping[str, LiveExperts]:
    """The layers with the experts that the maps give them. maps: None if experts never move."""
    if maps is None:
        return layers
    return {
        name: replace(live, local_experts=maps.ranks_of(name, live.ep_size)[live.ep_rank])
        if name in maps.layers
        else live  # not one that EPLB moves
        for name, live in layers.items()
    }


def expert_map_document(maps: ExpertMaps, ep_size: int) -> dict[str, object]:
    """The maps as `lorashard split --expert-map` takes them, as JSON.

    A rank's file has each of its experts once, also where several of its slots hold it. Layers go by
    their number, since an adapter may call their modules otherwise.
    """
    numbers = {name: _layer_number(name) for name in maps.layers}
    are_clear = None not in numbers.values() and len(set(numbers.values())) == len(numbers)
    layers = {
        numbers[name] if are_clear else name: [
            list(dict.fromkeys(experts)) for experts in maps.ranks_of(name, ep_size)
        ]
        for name in maps.layers
    }
    return {
        OF_ENGINE: True,
        "num_experts": 1 + max(max(slots) for slots in maps.layers.values()),
        "ep_size": ep_size,
        "ranks": next(iter(layers.values())),
        "layers": {key: {"ranks": ranks} for key, ranks in layers.items()},
    }


def _layer_number(name: str) -> str | None:
    """The only number in a module's name."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None
