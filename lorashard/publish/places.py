"""Where the bytes of a part go: a plan, and a part -> places in the shard files. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from lorashard.publish.parts import Part
from lorashard.shards.plan import CopyRange, Rearrange, ShardPlan, Target
from lorashard.writing.blocks import BLOCK_BYTES, COLUMN_BLOCK_BYTES, RearrangeBlock, axis_sizes


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [begin, end) of a part, as they lie in memory, and where they go."""

    target: Target
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PartBlock:
    """A block to rearrange, and where its bytes begin in the part, as it lies in memory."""

    block: RearrangeBlock
    begin: int


class PartPlaces:
    """The places of all parts of one adapter. entries: its tensors, by name."""

    def __init__(self, plan: ShardPlan, entries: Mapping[str, TensorEntry]) -> None:
        self._reads = plan.reads
        self._begins = [op.begin for op in plan.reads]
        self._entries = entries

    def copies(self, part: Part) -> Iterator[Place]:
        """Where a part's bytes go as they are."""
        begin, done = self._entries[part.name].begin, 0
        for offset, length in part.runs:
            first, last = begin + offset, begin + offset + length
            while first < last:
                op = self._reads[bisect_right(self._begins, first) - 1]
                end = min(last, op.end)
                if isinstance(op, CopyRange):
                    for target in op.targets:
                        place = Target(target.file, target.offset + first - op.begin)
                        yield Place(place, done, done + end - first)
                done += end - first
                first = end

    def rearrangements(self, part: Part) -> Iterator[PartBlock]:
        """What of a part is put in another order, or padded to a larger r, on the way.

        Raises LayoutError if the part is cut where that cannot be done.
        """
        entry, done = self._entries[part.name], 0
        for offset, length in part.runs:
            first, last = entry.begin + offset, entry.begin + offset + length
            while first < last:
                op = self._reads[bisect_right(self._begins, first) - 1]
                end = min(last, op.end)
                if isinstance(op, Rearrange):
                    for block in _blocks_between(op, first, end, part.name):
                        yield PartBlock(block, done + block.begin - first)
                done += end - first
                first = end


def files_with_gaps(plan: ShardPlan) -> frozenset[int]:
    """Of which files some bytes are in no part, so that they are zero only where the file is new."""
    unfilled = [file.size_bytes - len(file.header) for file in plan.files]
    for op in plan.reads:
        if isinstance(op, CopyRange):
            size, targets = op.end - op.begin, op.targets
        else:
            size = op.rows * op.cols * ELEMENT_SIZE[op.dtype]
            targets = tuple(chain.from_iterable(op.targets))
        for target in targets:
            unfilled[target.file] -= size
    return frozenset(file for file, size in enumerate(unfilled) if size)


def _blocks_between(op: Rearrange, begin: int, end: int, name: str) -> Iterator[RearrangeBlock]:
    """Blocks of the source bytes [begin, end)."""
    unit = (op.end - op.begin) // axis_sizes(op)[op.axes[0]]
    if (begin - op.begin) % unit or (end - op.begin) % unit:
        raise LayoutError(
            f"{name}: it is cut inside what has to stay together on the way to the shards.",
            hint="Gather this tensor on one rank before you give it to the writer.",
        )
    first, last = (begin - op.begin) // unit, (end - op.begin) // unit
    step = max(1, (COLUMN_BLOCK_BYTES if op.axes[0] == "c" else BLOCK_BYTES) // unit)
    for at in range(first, last, step):
        to = min(at + step, last)
        yield RearrangeBlock(op.begin + at * unit, op.begin + to * unit, op, at, to)
