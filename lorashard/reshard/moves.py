"""Shard files of one placement -> shard files of another: where each byte goes. Pure.

Every slot is moved as it is, so values that were padded, transposed or cast stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorashard.adapter.layout import AdapterLayout
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.shards.placement import Placement
from lorashard.shards.plan import CopyRange, ShardPlan, Target, expert_slots, merge_copies


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [begin, end) of one old file; `file` is its index in the old plan's files."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class MovePlan:
    """How to write the new files from the old ones.

    `plan` writes the new files; its source is the bytes of `stretches`, one after the other. They
    pass through each old file front to back, and through all of it but its header.
    copies: the places of each factor that the old files have several times; the first is moved.
    """

    plan: ShardPlan
    stretches: tuple[Stretch, ...]
    copies: tuple[tuple[Stretch, ...], ...]


@dataclass(frozen=True, slots=True)
class _Move:
    """One slot, or one replicated tensor: `size_bytes` at `place` in the old files.

    places: where the factor is, in the move of the first of them.
    """

    place: Target
    size_bytes: int
    targets: tuple[Target, ...]
    places: tuple[Target, ...] = ()


def plan_moves(
    layout: AdapterLayout,
    old: ShardPlan,
    old_placement: Placement,
    new: ShardPlan,
    new_placement: Placement,
) -> MovePlan:
    """Decide where each byte of the old files goes; both plans are of `layout`, in one dtype."""
    stretches: list[Stretch] = []
    reads: list[CopyRange] = []
    copies: list[tuple[Stretch, ...]] = []
    position = 0
    for move in _moves(layout, old, old_placement, new, new_placement):
        file, begin = move.place.file, move.place.offset
        if stretches and (stretches[-1].file, stretches[-1].end) == (file, begin):
            begin = stretches.pop().begin
        stretches.append(Stretch(file, begin, move.place.offset + move.size_bytes))
        reads.append(CopyRange(position, position + move.size_bytes, move.targets))
        position += move.size_bytes
        if len(move.places) > 1 and move.size_bytes:
            copies.append(tuple(
                Stretch(place.file, place.offset, place.offset + move.size_bytes)
                for place in move.places
            ))  # fmt: skip
    plan = ShardPlan(new.files, tuple(merge_copies(reads)), ())
    return MovePlan(plan, tuple(stretches), tuple(copies))


def _moves(
    layout: AdapterLayout,
    old: ShardPlan,
    old_placement: Placement,
    new: ShardPlan,
    new_placement: Placement,
) -> Iterator[_Move]:
    """Tensor by tensor, rank after rank, so that the new files grow front to back."""
    old_begins, new_begins = ([file.begins for file in plan.files] for plan in (old, new))
    for entry in old.files[0].tensors:
        if entry.size_bytes:
            target = Target(0, new_begins[0][entry.name])
            yield _Move(Target(0, entry.begin), entry.size_bytes, (target,))
    stacks = {stack.name: stack for module in layout.modules for stack in module.stacks}
    # All rank files have the same tensors in the same order, also those of ranks without experts.
    for entry, *_ in zip(*(file.tensors for file in old.files[1:])):
        stack, dtype = stacks[entry.name], entry.dtype
        before = expert_slots(stack, old_placement.ranks_of(stack.module), old_begins, dtype)
        after = expert_slots(stack, new_placement.ranks_of(stack.module), new_begins, dtype)
        slot_bytes = stack.rows * stack.cols * ELEMENT_SIZE[dtype]
        # Of a redundant expert the first copy is moved, the others are only read and compared.
        moves = [
            _Move(place, slot_bytes, () if number else after[expert], () if number else places)
            for expert, places in before.items()
            for number, place in enumerate(places)
        ]
        yield from sorted(moves, key=lambda move: (move.place.file, move.place.offset))
