"""Which blocks of tensors with another order of axes are read, and where in the region they go. Pure.

`reads` plans what a source has as the shards do. Here it is factors that a writer stored otherwise,
such as PEFT's fused ones, where the values of all experts alternate. They are put in order on the
way from the file to the region.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import WEIGHTS, Rearrangement, Scaling
from lorashard.vllm_plugin.load.reads import (
    LayerPlan,
    PlacedFactor,
    PlacedPiece,
    pieces_by_stack,
    scaling_of,
    scaling_of_slots,
)
from lorashard.writing.blocks import RearrangeBlock, axis_sizes, split_into_blocks

_STACKS = 0  # the source whose stacks they fill

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a block's factors, and where they go in a tensor for set_lora.

    source: experts, rows and columns of the block. target: slots, rows and columns of `into`.
    scaling: as in `ReadJob`.
    """

    source: Box
    into: PlacedFactor
    target: Box
    scaling: Scaling | None


@dataclass(frozen=True, slots=True)
class RearrangeJob:
    """Read a block of a source and put its parts into their places.

    shape: the block's sizes as they lie in the source. order: its axes that are [expert, row, col].
    """

    block: RearrangeBlock
    shape: tuple[int, ...]
    order: tuple[int, ...]
    parts: tuple[Part, ...]
    ep_rank: int = WEIGHTS

    @property
    def size_bytes(self) -> int:
        """How much of what is read has a place."""
        num_values = sum(_num_values(part, self.shape, self.order) for part in self.parts)
        return num_values * ELEMENT_SIZE[self.block.op.dtype]


def plan_rearrangements(
    layers: Sequence[LayerPlan], rearrangements: Sequence[Rearrangement]
) -> Iterator[RearrangeJob]:
    """Every block that has something for one of the layers."""
    stacks = {
        stack.name: (layer, stack, pieces)
        for layer in layers
        for stack, pieces in pieces_by_stack(layer).items()
    }
    for rearrangement in rearrangements:
        if rearrangement.stack not in stacks:  # its module is on another pipeline stage
            continue
        for block in split_into_blocks([rearrangement.op]):
            assert isinstance(block, RearrangeBlock)
            extent = _extent(block)
            parts = tuple(_parts(extent, rearrangement, *stacks[rearrangement.stack]))
            if parts:
                axes = block.op.axes
                shape = tuple(len(extent[axis]) for axis in axes)
                yield RearrangeJob(block, shape, tuple(map(axes.index, "erc")), parts)


def _extent(block: RearrangeBlock) -> dict[str, range]:
    """Axis -> what of it is in the block."""
    ranges = {axis: range(size) for axis, size in axis_sizes(block.op).items()}
    return ranges | {block.op.axes[0]: range(block.first, block.last)}


def _parts(
    extent: dict[str, range],
    rearrangement: Rearrangement,
    layer: LayerPlan,
    stack: ShardStack,
    pieces: Sequence[PlacedPiece],
) -> Iterator[Part]:
    experts, rows, cols = (extent[axis] for axis in "erc")
    on_device = _device_slots(layer)
    slots = [
        None if slot is None else on_device.get(slot)
        for slot in rearrangement.slots[experts.start : experts.stop]
    ]
    for in_block, in_slots in _matching_slices(slots):
        scaling = scaling_of_slots(scaling_of(layer, stack), layer.experts[in_slots])
        for placed in pieces:
            piece = placed.piece
            first, stop = (bisect_left(piece.source_rows, row) for row in (rows.start, rows.stop))
            if first == stop:
                continue
            first_col = piece.first_col + cols.start
            yield Part(
                (in_block, _slice(piece.source_rows[first:stop], -rows.start), slice(len(cols))),
                placed.into,
                (in_slots, _slice(piece.target_rows[first:stop]), slice(first_col, first_col + len(cols))),
                scaling,
            )  # fmt: skip


def _device_slots(layer: LayerPlan) -> dict[int, int]:
    """Slot of the source's file -> slot on the device."""
    return {
        run.src_slot + n: run.dst_slot + n
        for run in layer.runs
        if run.ep_rank == _STACKS
        for n in range(run.count)
    }


def _matching_slices(slots: Sequence[int | None]) -> list[tuple[slice, slice]]:
    """Where the slots are listed, and the slots: one pair of slices if that does, or one for each."""
    places = [(position, slot) for position, slot in enumerate(slots) if slot is not None]
    if not places:
        return []
    (position, slot), (last, _) = places[0], places[-1]
    step = places[1][0] - position if len(places) > 1 else 1
    positions, wanted = range(position, last + 1, step), range(slot, slot + len(places))
    if len(positions) == len(wanted) and places == list(zip(positions, wanted)):
        return [(_slice(positions), _slice(wanted))]
    return [(slice(at, at + 1), slice(slot, slot + 1)) for at, slot in places]


def _slice(numbers: range, shift: int = 0) -> slice:
    return slice(numbers.start + shift, numbers.stop + shift, numbers.step)


def _num_values(part: Part, shape: tuple[int, ...], order: tuple[int, ...]) -> int:
    sizes = (shape[axis] for axis in order)
    return prod(len(range(*box.indices(size))) for box, size in zip(part.source, sizes))
