"""ShardPlan.reads -> blocks that fit a buffer, in source order. Pure.

A block is the unit of reading: the largest one bounds the memory, whatever the adapter's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lorashard.shards.plan import CopyRange, ReadOp, Rearrange, Target

BLOCK_BYTES = 4 * 2**20  # a few of them fit the processor's cache
# A block of a tensor whose slowest axis is the factor's column gives each slot many short rows.
# Longer blocks give longer rows: 64 MiB holds 128 experts with r=32 and 8,192 columns in bf16.
COLUMN_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Source bytes [begin, end) of copies that adjoin each other."""

    begin: int
    end: int
    copies: tuple[CopyRange, ...]


@dataclass(frozen=True, slots=True)
class RearrangeBlock:
    """Indices [first, last) of the slowest axis of `op`, source bytes [begin, end)."""

    begin: int
    end: int
    op: Rearrange
    first: int
    last: int


Block = CopyBlock | RearrangeBlock


@dataclass(frozen=True, slots=True)
class Run:
    """Source bytes that lie side by side in an output file, from `target` on.

    pieces: [begin, end) in the source, in the order of the file. Tensors of one kind are neighbours
    there, and in the source an expert's tensors are.
    """

    target: Target
    pieces: tuple[tuple[int, int], ...]


def split_into_blocks(
    reads: Sequence[ReadOp],
    block_bytes: int = BLOCK_BYTES,
    column_block_bytes: int = COLUMN_BLOCK_BYTES,
    *,
    is_aligned: bool = False,
) -> Iterator[Block]:
    """Cut and join `reads` (in source order) into blocks of at most the given sizes.

    One index of a Rearrange's slowest axis is never cut, so a block can be larger if that is.
    is_aligned: copies are cut where the source has a multiple of `block_bytes`.
    """
    pending: list[CopyRange] = []
    size = 0
    for op in reads:
        if isinstance(op, CopyRange):
            for piece in _cut(op, block_bytes, is_aligned=is_aligned):
                length = piece.end - piece.begin
                is_full = size + length > block_bytes
                is_full |= is_aligned and piece.begin % block_bytes == 0
                if pending and (is_full or pending[-1].end != piece.begin):
                    yield CopyBlock(pending[0].begin, pending[-1].end, tuple(pending))
                    pending, size = [], 0
                pending.append(piece)
                size += length
            continue
        if pending:
            yield CopyBlock(pending[0].begin, pending[-1].end, tuple(pending))
            pending, size = [], 0
        yield from _rearrange_blocks(op, block_bytes, column_block_bytes)
    if pending:
        yield CopyBlock(pending[0].begin, pending[-1].end, tuple(pending))


def find_runs(places: Iterable[tuple[Target, int, int]]) -> Iterator[Run]:
    """Join what lies side by side. places: (target, begin, end), no two of which overlap."""
    pieces: list[tuple[int, int]] = []
    first, end = Target(0, 0), (-1, 0)
    for file, offset, piece in sorted((t.file, t.offset, (begin, end)) for t, begin, end in places):
        if (file, offset) != end:
            if pieces:
                yield Run(first, tuple(pieces))
            first, pieces = Target(file, offset), []
        pieces.append(piece)
        end = (file, offset + piece[1] - piece[0])
    if pieces:
        yield Run(first, tuple(pieces))


def axis_sizes(op: Rearrange) -> dict[str, int]:
    """Sizes of the source tensor's axes: e expert, r row, c column."""
    return {"e": len(op.targets), "r": op.rows, "c": op.cols}


def _cut(op: CopyRange, block_bytes: int, *, is_aligned: bool) -> Iterator[CopyRange]:
    first = op.begin // block_bytes * block_bytes if is_aligned else op.begin
    if op.end - first <= block_bytes:
        yield op
        return
    for cut in range(first, op.end, block_bytes):
        begin, end = max(cut, op.begin), min(cut + block_bytes, op.end)
        shift = begin - op.begin
        targets = tuple(Target(target.file, target.offset + shift) for target in op.targets)
        yield CopyRange(begin, end, targets)


def _rearrange_blocks(
    op: Rearrange, block_bytes: int, column_block_bytes: int
) -> Iterator[RearrangeBlock]:
    count = axis_sizes(op)[op.axes[0]]
    unit = (op.end - op.begin) // count
    limit = column_block_bytes if op.axes[0] == "c" else block_bytes
    step = max(1, limit // unit)
    for first in range(0, count, step):
        last = min(first + step, count)
        yield RearrangeBlock(op.begin + first * unit, op.begin + last * unit, op, first, last)
