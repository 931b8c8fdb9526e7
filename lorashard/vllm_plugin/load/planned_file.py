"""A file that `lorashard split` would write, read straight from the adapter.

In: the plan of a split, and the adapter's weights. Out: a ByteSource of one file's data, if that
consists of whole stretches of the weights. Nothing is read before it is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from lorashard.shards.plan import CopyRange, ShardPlan
from lorashard.storage.local import ByteSource


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Bytes [begin, end) of the file are those of the weights from `source` on."""

    begin: int
    end: int
    source: int


_begin_of = attrgetter("begin")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """What of the file is in no stretch is zero. Several threads may read.

    offsets: tensor name -> its first byte, from the start of the file. stretches: in its order.
    """

    offsets: Mapping[str, int]
    stretches: Sequence[_Stretch]
    weights: ByteSource

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the file. Raises what the weights raise."""
        at, end = offset, offset + len(buffer)
        first = max(0, bisect_right(self.stretches, offset, key=_begin_of) - 1)
        for stretch in islice(self.stretches, first, None):
            begin, stop = max(at, stretch.begin), min(end, stretch.end)
            if begin >= end:
                break
            if begin < stop:
                _fill_with_zeros(buffer[at - offset : begin - offset])
                source = stretch.source + begin - stretch.begin
                self.weights.read_into(buffer[begin - offset : stop - offset], source)
                at = stop
        _fill_with_zeros(buffer[at - offset :])


def planned_file(plan: ShardPlan, number: int, weights: ByteSource) -> PlannedFile | None:
    """File `number` of the plan; None if some of its data has to be rearranged."""
    stretches = []
    for op in plan.reads:
        if isinstance(op, CopyRange):
            stretches += [
                _Stretch(target.offset, target.offset + op.end - op.begin, op.begin)
                for target in op.targets
                if target.file == number
            ]
        elif any(target.file == number for targets in op.targets for target in targets):
            return None
    stretches.sort(key=_begin_of)
    return PlannedFile(plan.files[number].begins, stretches, weights)


def _fill_with_zeros(buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
