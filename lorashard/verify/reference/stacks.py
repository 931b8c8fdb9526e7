"""Every value of the shard files against the source's, bit for bit.

Each comparison yields one sentence for every difference. It reads on its own, so that several can
run in threads, and holds some rows or one expert's matrix, never a tensor.

Legend: E experts, n rows of a source tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod

import numpy as np

from lorashard.verify.reference.files import PickledTensors, ReadTensor, SafetensorsFile
from lorashard.verify.reference.pieces import Piece, plain_key, unpack_expert, unpack_rows
from lorashard.verify.reference.projections import Factor
from lorashard.verify.reference.values import (
    Bits,
    Difference,
    Read,
    are_equal,
    cast_bits,
    describe,
    first_difference,
    is_cast,
)

_MAX_FINDINGS_PER_TENSOR = 20
_BLOCK_BYTES = 8 * 2**20  # of rows that interleave the experts
_STEP_BYTES = 2**16  # of them, unpacked at once: as much as the nearest caches hold
_STEP_ROWS = 32  # at least, if they become columns: together they fill cache lines

# What is different in a slot of a stack, by element of the expert's matrix.
_DifferenceIn = Callable[["Stack", int], Difference | None]


@dataclass(frozen=True, slots=True)
class Source:
    """The source's tensors, with their values cast if the shards' were.

    cast: torch's name of a dtype. progress: called with the bytes of the source that were compared.
    """

    tensors: SafetensorsFile | PickledTensors
    num_experts: int
    cast: str | None
    progress: Callable[[int], None]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in the shards, by torch's name."""
        dtype = self.tensors.dtypes[name]
        return self.cast if self.cast is not None and is_cast(dtype, self.cast) else dtype

    def reader(self) -> ReadTensor:
        """A function for one thread that reads a tensor's values."""
        read, dtypes, cast = self.tensors.reader(), self.tensors.dtypes, self.cast
        if cast is None:
            return read

        def read_cast(name: str, begin: int, end: int) -> Bits:
            bits = read(name, begin, end)
            return cast_bits(bits, dtypes[name], cast) if is_cast(dtypes[name], cast) else bits

        return read_cast

    def advance(self, name: str, num_elements: int) -> None:
        """Report that so many elements of a tensor were compared, for the first time."""
        self.progress(num_elements * self.tensors.item_sizes[name])


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor of a shard file. `experts`: which expert each slot holds, None = all of them.

    read: the file's, for one thread.
    """

    file: SafetensorsFile
    read: ReadTensor
    name: str
    experts: tuple[int | None, ...]
    matrix_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it must have."""
        return (len(self.experts), *self.matrix_shape)

    def read_slot(self, slot: int, begin: int, end: int) -> Bits:
        """Elements [begin, end) of the matrix in a slot."""
        first = slot * prod(self.matrix_shape)
        return self.read(self.name, first + begin, first + end)


def compare_replicated(source: Source, name: str, shard: SafetensorsFile) -> Iterator[str]:
    """Compare a tensor that every rank needs."""
    key, shape = plain_key(name), source.tensors.shapes[name]
    where = f"{shard.name}: {key}"
    if key not in shard.shapes:
        yield f"{where} is missing."
    elif shard.dtypes[key] != source.dtype(name):
        yield f"{where}: {_other_dtype(shard.dtypes[key], source.dtype(name))}"
    elif shard.shapes[key] != shape:
        found = list(shard.shapes[key])
        yield f"{where}: shape is torch.Size({found}), in the source torch.Size({list(shape)})."
    else:
        expected, actual = partial(source.reader(), name), partial(shard.reader(), key)
        if difference := first_difference(expected, actual, prod(shape)):
            yield f"{where}: {describe(difference, shape, shard.dtypes[key])}"
    source.advance(name, prod(shape))


def compare_stacks(source: Source, factor: Factor, stacks: Sequence[Stack]) -> Iterator[str]:
    """Compare a factor of every expert wherever the placement puts it."""
    if factor.whole is not None and factor.whole.interleaves_experts:
        difference_in = _compare_rows(source, factor.whole, stacks)
    else:
        difference_in = _compare_matrices(source, factor)
    for stack in stacks:
        found = _compare_stack(source, factor, stack, difference_in)
        yield from capped(f"{stack.file.name}: {stack.name}", found)


def _compare_stack(
    source: Source, factor: Factor, stack: Stack, difference_in: _DifferenceIn
) -> Iterator[str]:
    shape = stack.file.shapes.get(stack.name)
    if shape is None:
        yield "is missing."
        return
    if shape != stack.shape:
        yield f"has shape {list(shape)}, not {list(stack.shape)}."
        return
    dtype = stack.file.dtypes[stack.name]
    for slot, expert in enumerate(stack.experts):
        who = "shared by all experts" if expert is None else f"expert {expert} (slot {slot})"
        piece = factor.piece_of(expert)
        if piece is None:
            who = f"{who}, not trained"
        elif piece.unpacked_shape(source.num_experts)[1:] != stack.matrix_shape:
            who = f"{who}, padded with zeros"
        if piece is not None and source.dtype(piece.name) != dtype:
            yield f"{who}: {_other_dtype(dtype, source.dtype(piece.name))}"
        elif difference := difference_in(stack, slot):
            yield f"{who}: {describe(difference, stack.matrix_shape, dtype)}"


def _compare_matrices(source: Source, factor: Factor) -> _DifferenceIn:
    """For tensors in which each expert's matrix is in one piece: it is read when it is its turn."""
    read = source.reader()
    seen: set[tuple[str, int]] = set()

    def difference_in(stack: Stack, slot: int) -> Difference | None:
        expert = stack.experts[slot]
        piece = factor.piece_of(expert)
        if piece is None:
            expected = _zeros(stack.file.item_sizes[stack.name])
        else:
            index = expert if piece.expert is None and expert is not None else 0
            size = prod(piece.unpacked_shape(source.num_experts)[1:])
            if (piece.name, index) not in seen:
                seen.add((piece.name, index))
                source.advance(piece.name, size)
            in_source = _from(partial(read, piece.name), index * size)
            expected = _as_in_slot(in_source, piece, source.num_experts, stack.matrix_shape)
        return first_difference(expected, partial(stack.read_slot, slot), prod(stack.matrix_shape))

    return difference_in


def _zeros(item_size: int) -> Read:
    return lambda begin, end: np.zeros(end - begin, f"u{item_size}")


def _from(read: Read, first: int) -> Read:
    return lambda begin, end: read(first + begin, first + end)


def _as_in_slot(read: Read, piece: Piece, num_experts: int, matrix_shape: tuple[int, int]) -> Read:
    """An expert's matrix in the source -> as its slot must have it: upright, padded with zeros."""
    _, rows, columns = piece.unpacked_shape(num_experts)
    if (rows, columns) == matrix_shape and not piece.transposed:
        return read
    matrix = unpack_expert(read(0, rows * columns), piece, num_experts)
    padded = np.zeros(matrix_shape, matrix.dtype)
    padded[:rows, :columns] = matrix
    return lambda begin, end: padded.reshape(-1)[begin:end]


def _compare_rows(source: Source, piece: Piece, stacks: Sequence[Stack]) -> _DifferenceIn:
    """For a tensor in whose rows are all experts: it is read once, front to back, for all stacks."""
    fitting = [
        stack
        for stack in stacks
        if stack.file.shapes.get(stack.name) == stack.shape
        and stack.file.dtypes[stack.name] == source.dtype(piece.name)
    ]
    first: dict[tuple[str, int], Difference] = {}
    for begin, experts in _unpacked_blocks(source, piece):
        for stack in fitting:
            for slot, expert in enumerate(stack.experts):
                assert expert is not None  # such a tensor is not shared
                difference = _difference_in_block(stack, slot, experts[expert], begin, piece)
                key = stack.file.name, slot
                if difference and (key not in first or difference.element < first[key].element):
                    first[key] = difference
    return lambda stack, slot: first.get((stack.file.name, slot))


def _difference_in_block(
    stack: Stack, slot: int, expected: Bits, begin: int, piece: Piece
) -> Difference | None:
    """expected: rows of the matrix from row `begin` on, or columns if `piece` is transposed."""
    rows, columns = stack.matrix_shape
    if piece.transposed:
        matrix = stack.read_slot(slot, 0, rows * columns).reshape(rows, columns)
        actual = matrix[:, begin : begin + expected.shape[1]]
        top, left = 0, begin
    else:
        end = begin + len(expected)
        actual = stack.read_slot(slot, begin * columns, end * columns).reshape(-1, columns)
        top, left = begin, 0
    if are_equal(expected, actual):
        return None
    row, column = divmod(int((expected != actual).argmax()), expected.shape[1])
    element = (top + row) * columns + left + column
    return Difference(element, expected[row, column], actual[row, column])


def _unpacked_blocks(source: Source, piece: Piece) -> Iterator[tuple[int, Bits]]:
    """Row of the source tensor, and so many rows from there on as `unpack_rows` gives them.

    Valid until the next block. A few rows at a time are unpacked: of more, each value would be in
    a part of memory that is in no cache.
    """
    read = source.reader()
    num_rows, width = piece.shape[0], prod(piece.shape[1:])
    row_bytes = width * read(piece.name, 0, 1).itemsize
    in_block = min(num_rows, max(_STEP_ROWS, _BLOCK_BYTES // row_bytes))
    step = max(_STEP_ROWS if piece.transposed else 1, _STEP_BYTES // row_bytes)
    _, rows, columns = piece.unpacked_shape(source.num_experts)
    shape = (rows, in_block) if piece.transposed else (in_block, columns)
    block = np.empty((source.num_experts, *shape), f"u{row_bytes // width}")
    along = 2 if piece.transposed else 1
    for begin in range(0, num_rows, in_block):
        end = min(begin + in_block, num_rows)
        part = _slice(block, along, 0, end - begin)
        for at in range(begin, end, step):
            until = min(at + step, end)
            values = read(piece.name, at * width, until * width).reshape(until - at, width)
            _slice(part, along, at - begin, until - begin)[:] = unpack_rows(
                values, piece, source.num_experts
            )
        source.advance(piece.name, (end - begin) * width)
        yield begin, part


def _slice(block: Bits, along: int, begin: int, end: int) -> Bits:
    return block[:, begin:end] if along == 1 else block[:, :, begin:end]


def _other_dtype(found: str, expected: str) -> str:
    return f"dtype is torch.{found}, in the source torch.{expected}."


def capped(where: str, findings: Iterator[str]) -> Iterator[str]:
    """Prefix findings with their place; past the limit, only count them."""
    for finding in islice(findings, _MAX_FINDINGS_PER_TENSOR):
        yield f"{where}: {finding}"
    rest = sum(1 for _ in findings)
    if rest:
        yield f"{where}: {rest} more differences of this kind."
