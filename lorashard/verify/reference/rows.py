"""A source tensor whose rows have columns of every expert, against the slots of all shard files.

It is read once, front to back, in blocks of rows.

Legend: E experts, n rows of the source tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np

from lorashard.verify.reference.pieces import Piece, unpack_rows
from lorashard.verify.reference.sides import Source, Stack
from lorashard.verify.reference.values import Bits, Difference, are_equal, first_of

_BLOCK_BYTES = 8 * 2**20
_STEP_BYTES = 2**19  # read and unpacked at once: what the processor's cache holds


def compare_rows(
    source: Source, piece: Piece, stacks: Sequence[Stack]
) -> Mapping[Stack, Mapping[int, Difference]]:
    """The first difference in each slot, of the stacks that have the right shape and dtype."""
    found: dict[Stack, dict[int, Difference]] = {
        stack: {}
        for stack in stacks
        if stack.file.shapes.get(stack.name) == stack.shape
        and stack.file.dtypes[stack.name] == source.dtype(piece.name)
    }
    if not found:
        return found
    compare = _compare_columns if piece.transposed else _compare_slot_rows
    item_size = next(iter(found)).item_size
    for begin, experts in _unpacked_blocks(source, piece, item_size):
        for stack, differences in found.items():
            for slot, difference in compare(stack, begin, experts):
                known = differences.get(slot, difference)
                differences[slot] = min(known, difference, key=lambda each: each.element)
    return found


def _compare_slot_rows(stack: Stack, begin: int, experts: Bits) -> Iterator[tuple[int, Difference]]:
    """experts: [E, n, columns], where the slots have rows from `begin` on."""
    _, num_rows, columns = experts.shape
    found = bytearray(num_rows * columns * experts.itemsize)
    actual: Bits = np.frombuffer(found, experts.dtype)
    for slot, expert in enumerate(stack.experts):
        expected: Bits = experts[expert]
        stack.read_into(slot, begin * columns, actual)
        if not are_equal(found, expected):
            difference = first_of(begin * columns, expected.reshape(-1), actual)
            assert difference is not None
            yield slot, difference


def _compare_columns(stack: Stack, begin: int, experts: Bits) -> Iterator[tuple[int, Difference]]:
    """experts: [E, n, rows], transposed: the slots have columns from `begin` on."""
    rows, columns = stack.matrix_shape
    matrix = np.empty((rows, columns), experts.dtype)
    actual = matrix[:, begin : begin + experts.shape[1]]
    for slot, expert in enumerate(stack.experts):
        expected: Bits = experts[expert].T
        stack.read_into(slot, 0, matrix.reshape(-1))
        differ = expected != actual
        if differ.any():
            row, column = divmod(int(differ.argmax()), differ.shape[1])
            element = row * columns + begin + column
            yield slot, Difference(element, expected[row, column], actual[row, column])


def _unpacked_blocks(source: Source, piece: Piece, item_size: int) -> Iterator[tuple[int, Bits]]:
    """Yield the number of a row, and rows from there on as `unpack_rows` gives them, contiguous.

    Valid until the next block. Few rows at a time are unpacked: a column of many would use one
    element of each part of memory that comes into the cache.
    """
    num_rows, width = piece.shape[0], prod(piece.shape[1:])
    step = min(num_rows, max(1, _STEP_BYTES // (width * item_size)))
    in_block = min(num_rows, max(step, _BLOCK_BYTES // (width * item_size)))
    values: Bits = np.empty((step, width), f"u{item_size}")
    for begin in range(0, num_rows, in_block):
        length = min(in_block, num_rows - begin)
        if begin == 0 or length < in_block:
            columns = width // source.num_experts
            block: Bits = np.empty((source.num_experts, length, columns), values.dtype)
        for first in range(0, length, step):
            rows = values[: min(step, length - first)]
            source.read_into(piece.name, (begin + first) * width, rows.reshape(-1))
            block[:, first : first + len(rows)] = unpack_rows(rows, piece, source.num_experts)
        source.advance(piece.name, length * width)
        yield begin, block
