"""What to say when a shard directory was cut for another placement. Pure but for the path."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lorashard.shards.placement import Placement, Ranks, linear_placement, round_robin_placement
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.fill import LayerPlan


def resplit_advice(
    path: Path, live: LiveExperts, cut_for: Sequence[Ranks], layers: Sequence[LayerPlan]
) -> str | None:
    """None if every layer comes whole from the rank's own file; else what to run instead."""
    if all(_is_own_file(live, ranks, layer) for ranks, layer in zip(cut_for, layers)):
        return None
    other = sorted({run.ep_rank for layer in layers for run in layer.runs})
    name, merged = shlex.quote(str(path)), shlex.quote(f"{path}-merged")
    return (
        f"cut for {len(cut_for[0])} ranks otherwise than this engine places the experts "
        f"(ep_size {live.ep_size}); the right ones were gathered from rank files "
        f"{', '.join(map(str, other[:8]))}{', …' if len(other) > 8 else ''}. A directory that "
        f"loads faster: lorashard merge {name} -o {merged} && lorashard split {merged} "
        f"--ep-size {live.ep_size}{_placement_flag(live)}"
    )


def is_first_concerned(live: LiveExperts, cut_for: Ranks) -> bool:
    """Whether this is the first rank whose experts do not stand in its own file: it tells."""
    placement = _engine_placement(live)
    if placement is None:
        return True
    fits = len(cut_for) == live.ep_size
    return all(fits and cut_for[k] == placement.ranks[k] for k in range(live.ep_rank))


def _is_own_file(live: LiveExperts, ranks: Ranks, layer: LayerPlan) -> bool:
    whole = len(ranks) == live.ep_size and ranks[live.ep_rank] == layer.experts
    return whole and all(run.ep_rank == live.ep_rank for run in layer.runs)


def _placement_flag(live: LiveExperts) -> str:
    placement = _engine_placement(live)
    if placement is None:
        return " --expert-map MAP.json"
    return "" if placement.strategy == "linear" else f" --placement {placement.strategy}"


def _engine_placement(live: LiveExperts) -> Placement | None:
    """The placement by rule that gives this rank its experts; None if no rule does."""
    for strategy in (linear_placement, round_robin_placement):
        placement = strategy(live.num_experts, live.ep_size)
        if placement.ranks[live.ep_rank] == live.local_experts:
            return placement
    return None
