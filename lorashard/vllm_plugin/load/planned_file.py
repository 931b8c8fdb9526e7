"""A file that `lorashard split` would write, read straight from the adapter.

In: the plan of a split, and the adapter's weights. Out: a ByteSource of what is in one file just as
it is in the weights, stretch by stretch. Nothing is read before it is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from lorashard.shards.plan import CopyRange, ShardPlan
from lorashard.storage.local import ByteSource


class Stretch(NamedTuple):
    """Bytes [begin, end) of the file are those of the weights from `source` on."""

    begin: int
    end: int
    source: int


_begin_of = attrgetter("begin")


@dataclass(frozen=True, slots=True)
class FileMap:
    """Where in the weights a file's bytes are.

    offsets: tensor name -> its first byte, from the start of the file. stretches: in its order.
    """

    offsets: Mapping[str, int]
    stretches: Sequence[Stretch]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """What of the file is in no stretch is zero. Several threads may read."""

    map: FileMap
    weights: ByteSource

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the file. Raises what the weights raise."""
        at, end, stretches = offset, offset + len(buffer), self.map.stretches
        first = max(0, bisect_right(stretches, offset, key=_begin_of) - 1)
        for begin, stop, source in islice(stretches, first, None):
            if begin >= end:
                break
            if at < stop:
                if at < begin:
                    _fill_with_zeros(buffer[at - offset : begin - offset])
                    at = begin
                piece = buffer[at - offset : min(end, stop) - offset]
                self.weights.read_into(piece, source + at - begin)
                at += len(piece)
        if at < end:
            _fill_with_zeros(buffer[at - offset :])


def map_files(plan: ShardPlan, count: int) -> tuple[FileMap, ...]:
    """The first `count` files of a plan, without what has to be rearranged."""
    stretches: list[list[Stretch]] = [[] for _ in range(count)]
    for op in plan.reads:
        if isinstance(op, CopyRange):
            for target in op.targets:
                if target.file < count:
                    end = target.offset + op.end - op.begin
                    stretches[target.file].append(Stretch(target.offset, end, op.begin))
    for of_file in stretches:
        of_file.sort()
    return tuple(map(FileMap, (file.begins for file in plan.files), map(tuple, stretches)))


def _fill_with_zeros(buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
