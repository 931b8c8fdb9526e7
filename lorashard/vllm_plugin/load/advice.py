"""What to run when a shard directory was split for another placement than the engine's. Pure.

In: where each layer's experts come from on this rank. Out: the command that makes a directory that
every rank loads from its own file, or None where this one already is.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from lorashard.shards.placement import Placement, Ranks, linear_placement, round_robin_placement
from lorashard.vllm_plugin.load.rows import Run

_MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where one MoE layer's experts come from.

    local_experts: global ids on this rank, in slot order. ranks: the same for each rank file.
    runs: which slots of which files are read.
    """

    local_experts: tuple[int, ...]
    ranks: Ranks
    runs: tuple[Run, ...]


def resplit_advice(
    directory: str, origins: Sequence[LayerOrigin], *, ep_rank: int, ep_size: int, num_experts: int
) -> str | None:
    """None if every layer comes whole from the rank's own file; else what to run instead.

    The command restores the placement of the first layer's experts.
    """
    if all(_is_own_file(origin, ep_rank, ep_size) for origin in origins):
        return None
    first = origins[0]
    files = sorted({run.ep_rank for origin in origins for run in origin.runs})
    listed = ", ".join(map(str, files[:_MAX_LISTED])) + (", …" if files[_MAX_LISTED:] else "")
    source, target = shlex.quote(directory), shlex.quote(f"{directory}-resharded")
    placement = _rule_that_gives(first.local_experts, ep_rank, ep_size, num_experts)
    return (
        f"split for {len(first.ranks)} rank{'' if len(first.ranks) == 1 else 's'}, with a "
        f"different placement from this engine's (ep_size {ep_size}); ep rank {ep_rank} reads its "
        f"experts from rank file{'' if len(files) == 1 else 's'} {listed}. For faster loads: "
        f"lorashard reshard {source} -o {target} --ep-size {ep_size}{_placement_option(placement)}"
    )


def is_first_mismatch(origin: LayerOrigin, *, ep_rank: int, ep_size: int, num_experts: int) -> bool:
    """Whether all ranks before this one have their experts in their own file.

    Every rank needs the same advice; the first one that does gives it.
    """
    placement = _rule_that_gives(origin.local_experts, ep_rank, ep_size, num_experts)
    if placement is None:
        return True
    fits = len(origin.ranks) == ep_size
    return all(fits and origin.ranks[k] == placement.ranks[k] for k in range(ep_rank))


def _is_own_file(origin: LayerOrigin, ep_rank: int, ep_size: int) -> bool:
    whole = len(origin.ranks) == ep_size and origin.ranks[ep_rank] == origin.local_experts
    return whole and all(run.ep_rank == ep_rank for run in origin.runs)


def _placement_option(placement: Placement | None) -> str:
    if placement is None:
        return " --expert-map MAP.json"
    return "" if placement.strategy == "linear" else f" --placement {placement.strategy}"


def _rule_that_gives(
    local_experts: tuple[int, ...], ep_rank: int, ep_size: int, num_experts: int
) -> Placement | None:
    """The placement by rule that gives this rank its experts; None if no rule does."""
    for rule in (linear_placement, round_robin_placement):
        placement = rule(num_experts, ep_size)
        if placement.ranks[ep_rank] == local_experts:
            return placement
    return None
