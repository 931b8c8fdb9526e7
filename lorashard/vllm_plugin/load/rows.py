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
    An expert that is listed twice is read into its first slot; `find_copies` has the others.
    Raises PlacementError for an expert that no file holds.
    """
    places: dict[int, tuple[int, int]] = {}
    preferred = [] if own_rank is None else [own_rank]
    for rank in [*(k for k in range(len(ranks)) if k != own_rank), *preferred]:
        places.update((expert, (rank, slot)) for slot, expert in enumerate(ranks[rank]))
    runs: list[Run] = []
    seen: set[int] = set()
    for dst_slot, expert in enumerate(local_experts):
        if expert in seen:
            continue
        seen.add(expert)
        if expert not in places:
            raise PlacementError(f"No rank file holds expert {expert}.")
        rank, src_slot = places[expert]
        last = runs[-1] if runs else None
        follows = last and last.dst_slot + last.count == dst_slot
        if last and follows and (last.ep_rank, last.src_slot + last.count) == (rank, src_slot):
            runs[-1] = Run(rank, last.src_slot, last.dst_slot, last.count + 1)
        else:
            runs.append(Run(rank, src_slot, dst_slot, 1))
    return tuple(runs)


def find_copies(local_experts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs (slot, first slot) of the same expert, for each slot but the first that has it."""
    first: dict[int, int] = {}
    for slot, expert in enumerate(local_experts):
        first.setdefault(expert, slot)
    return tuple(
        (slot, first[expert]) for slot, expert in enumerate(local_experts) if first[expert] != slot
    )
