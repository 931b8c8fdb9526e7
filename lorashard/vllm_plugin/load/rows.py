"""Which slots of which rank files a rank's local experts are read from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorashard.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Run:
    """`count` experts in neighbouring slots, both in a rank file and on the device."""

    ep_rank: int
    src_slot: int
    dst_slot: int
    count: int


def find_runs(
    ranks: Sequence[Sequence[int]], local_experts: Sequence[int], own_rank: int | None
) -> tuple[Run, ...]:
    """Where to read each local expert, in slot order, neighbours joined.

    ranks: the shards' placement, global ids in slot order per rank file.
    own_rank: the rank file to prefer for an expert that several files hold.
    Raises PlacementError for an expert that no file holds.
    """
    places: dict[int, tuple[int, int]] = {}
    preferred = [] if own_rank is None else [own_rank]
    for rank in [*(k for k in range(len(ranks)) if k != own_rank), *preferred]:
        places.update((expert, (rank, slot)) for slot, expert in enumerate(ranks[rank]))
    runs: list[Run] = []
    for dst_slot, expert in enumerate(local_experts):
        if expert not in places:
            raise PlacementError(f"No rank file holds expert {expert}.")
        rank, src_slot = places[expert]
        last = runs[-1] if runs else None
        if last and (last.ep_rank, last.src_slot + last.count) == (rank, src_slot):
            runs[-1] = Run(rank, last.src_slot, last.dst_slot, last.count + 1)
        else:
            runs.append(Run(rank, src_slot, dst_slot, 1))
    return tuple(runs)
