"""Which rows of a layer's experts go from which rank to which, when experts move. Pure.

All ranks plan alike from the same two maps, so that each of them knows what it sends, and what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertMoves:
    """What one rank does. Slots are its own, 0 to E_local - 1.

    sent: for each rank, the slots whose rows it gets; for the own rank, those that stay here.
    received: for each rank, how many rows come from it; for the own rank, how many stay here.
    targets: for each row that arrives, in the order of `received`, the slots that get it.
    most_sent: rows that the busiest rank sends to others.
    """

    sent: tuple[tuple[int, ...], ...]
    received: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    most_sent: int


def plan_moves(
    before: Sequence[int], after: Sequence[int], num_ranks: int, rank: int
) -> ExpertMoves:
    """What a rank does so that its slots, which have the experts of `before`, get those of `after`.

    before, after: one layer's maps, the expert in each physical slot of all ranks, -1 for none.
    An expert that several ranks have comes from the one that sends the least, and a rank that has it
    already copies it. Raises KeyError for an expert that was nowhere.
    """
    num_local = len(before) // num_ranks
    holders = _holders(before, num_local)
    sent: list[list[int]] = [[] for _ in range(num_ranks)]
    arriving: list[dict[int, list[int]]] = [{} for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for to_rank in range(num_ranks):
        own = slice(to_rank * num_local, (to_rank + 1) * num_local)
        sources: dict[int, int] = {}
        for slot, (old, expert) in enumerate(zip(before[own], after[own], strict=True)):
            if expert in (old, -1):
                continue
            source = sources.get(expert)
            if source is None:
                places = holders[expert]
                if len(places) == 1:
                    (source,) = places
                elif to_rank in places:
                    source = to_rank
                else:
                    source = min(places, key=lambda place: (loads[place], place))
                sources[expert] = source
                if source != to_rank:
                    loads[source] += 1
                if source == rank:
                    sent[to_rank].append(places[rank])
            if to_rank == rank:
                arriving[source].setdefault(expert, []).append(slot)
    return ExpertMoves(
        tuple(map(tuple, sent)),
        tuple(map(len, arriving)),
        tuple(tuple(slots) for of_rank in arriving for slots in of_rank.values()),
        max(loads),
    )


def _holders(experts: Sequence[int], num_local: int) -> dict[int, dict[int, int]]:
    """For each expert the ranks that have it, and there its first slot."""
    holders: dict[int, dict[int, int]] = {}
    for place, expert in enumerate(experts):
        rank, slot = divmod(place, num_local)
        if expert in holders:
            holders[expert].setdefault(rank, slot)
        else:
            holders[expert] = {rank: slot}
    return holders
