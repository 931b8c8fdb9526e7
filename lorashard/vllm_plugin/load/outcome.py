"""What loading an adapter comes to on one rank: what is read from where, or why not. Pure.

The one judgement of an adapter: the loader acts on it, `lorashard doctor` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorashard.errors import PlacementError
from lorashard.rules import OTHER_PLACEMENT
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.advice import LayerOrigin, is_first_mismatch, resplit_advice
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.matching import LayerNames, MatchedLayer, match_layers
from lorashard.vllm_plugin.settings import STRICT


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What one rank loads.

    layers: in the order of the engine's. advice: what to run for faster loads; None where each
    layer comes whole from the rank's own file, and for a plain adapter. gives_advice: whether this
    is the first rank to which the advice applies, which gives it for all.
    """

    layers: tuple[MatchedLayer, ...]
    advice: str | None
    gives_advice: bool


def explain_load(
    contents: AdapterContents,
    layers: Mapping[str, LiveExperts],
    names: LayerNames,
    shard_directory: str | None,
) -> LoadOutcome:
    """What loading these contents into these layers comes to.

    shard_directory: where the contents come from; None = a plain adapter, which has no placement.
    Raises LayoutError or PlacementError if the engine cannot take the adapter.
    """
    matched = match_layers(contents, layers, names)
    if shard_directory is None or not matched:
        return LoadOutcome(matched, None, gives_advice=False)
    origins = _origins(matched)
    live = matched[0].live
    advice = resplit_advice(
        shard_directory,
        origins,
        ep_rank=live.ep_rank,
        ep_size=live.ep_size,
        num_experts=live.num_experts,
    )
    first = is_first_mismatch(
        origins[0], ep_rank=live.ep_rank, ep_size=live.ep_size, num_experts=live.num_experts
    )
    return LoadOutcome(matched, advice, gives_advice=advice is not None and first)


def strict_error(shard_directory: str, advice: str) -> PlacementError:
    """The error that LORASHARD_STRICT makes of an advice."""
    return PlacementError(
        f"{shard_directory}: {advice}",
        hint=f"{STRICT} makes this an error.",
        rule=OTHER_PLACEMENT,
    )


def _origins(matched: Sequence[MatchedLayer]) -> list[LayerOrigin]:
    return [
        LayerOrigin(layer.live.local_experts, layer.contents.ranks, layer.runs) for layer in matched
    ]
