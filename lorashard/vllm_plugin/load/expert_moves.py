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
    holders: dict[int, dict[int, int]] = {}
    for place, expert in enumerate(before):
        holders.setdefault(expert, {}).setdefault(place // num_local, place % num_local)
    sent: list[list[list[int]]] = [[[] for _ in range(num_ranks)] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    found: dict[int, tuple[int, int]] = {}
    targets: list[tuple[int, int]] = []  # slot, expert
    for to_rank in range(num_ranks):
        first = to_rank * num_local
        places = {}
        for slot in range(num_local):
            expert = after[first + slot]
            if expert < 0 or before[first + slot] == expert:
                continue
            if expert not in places:
                own = holders[expert]
                source = to_rank if to_rank in own else min(own, key=lambda r: (loads[r], r))
                places[expert] = source, len(sent[source][to_rank])
                sent[source][to_rank].append(own[source])
                loads[source] += source != to_rank
            if to_rank == rank:
                targets.append((slot, expert))
        if to_rank == rank:
            found = places
    received = tuple(len(sent[source][rank]) for source in range(num_ranks))
    begins = [sum(received[:source]) for source in range(num_ranks)]
    slots_of: list[list[int]] = [[] for _ in range(sum(received))]
    for slot, expert in targets:
        source, place = found[expert]
        slots_of[begins[source] + place].append(slot)
    return ExpertMoves(
        tuple(tuple(slots) for slots in sent[rank]),
        received,
        tuple(tuple(slots) for slots in slots_of),
        max(loads),
    )
