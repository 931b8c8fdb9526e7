"""Every value of the shard files against the source's, bit for bit.

Each comparison yields one sentence for every difference. Several can run in threads. They hold some
rows or experts, never a tensor: `rows` compares tensors that interleave the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, starmap
from math import prod
from typing import Any

import numpy as np

from lorashard.verify.reference.files import SafetensorsFile
from lorashard.verify.reference.pieces import Piece, plain_key, unpack_expert
from lorashard.verify.reference.projections import Factor
from lorashard.verify.reference.rows import compare_rows
from lorashard.verify.reference.sides import Source, Stack
from lorashard.verify.reference.values import (
    Bits,
    Difference,
    describe,
    differing_chunks,
    first_of,
)

_MAX_FINDINGS_PER_TENSOR = 20


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
        expected, actual = partial(source.read_into, name), partial(shard.read_into, key)
        chunks = differing_chunks(expected, actual, prod(shape), shard.item_sizes[key])
        difference = next(filter(None, starmap(first_of, chunks)), None)
        if difference is not None:
            yield f"{where}: {describe(difference, shape, shard.dtypes[key])}"
    source.advance(name, prod(shape))


def compare_stacks(source: Source, factor: Factor, stacks: Sequence[Stack]) -> Iterator[str]:
    """Compare a factor of every expert wherever the placement puts it."""
    matrices = _Matrices(source, factor)
    whole = factor.whole
    in_rows = None
    if whole is not None and whole.interleaves_experts:
        in_rows = compare_rows(source, whole, stacks)
    for stack in stacks:
        shape = stack.file.shapes.get(stack.name)
        if shape is None:
            found = iter(["is missing."])
        elif shape != stack.shape:
            found = iter([f"has shape {list(shape)}, not {list(stack.shape)}."])
        elif in_rows is None:
            found = _describe_slots(source, factor, stack, _compare_slots(stack, matrices))
        else:
            found = _describe_slots(source, factor, stack, in_rows.get(stack, {}))
        yield from capped(f"{stack.file.name}: {stack.name}", found)


def _describe_slots(
    source: Source, factor: Factor, stack: Stack, differences: Mapping[int, Difference]
) -> Iterator[str]:
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
        elif slot in differences:
            yield f"{who}: {describe(differences[slot], stack.matrix_shape, dtype)}"


class _Matrices:
    """What slots must hold, of a factor with each expert's matrix in one piece of the source."""

    def __init__(self, source: Source, factor: Factor) -> None:
        self._source, self._factor = source, factor
        self._seen: set[tuple[str, int]] = set()
        self._laid_out: tuple[Stack, int, Bits] | None = None

    def read_into(self, stack: Stack, slot: int, begin: int, out: Bits) -> None:
        """Fill `out` with elements of a slot from `begin` on."""
        source, expert = self._source, stack.experts[slot]
        piece = self._factor.piece_of(expert)
        if piece is None:
            out[:] = 0
            return
        if source.dtype(piece.name) != stack.file.dtypes[stack.name]:
            stack.read_into(slot, begin, out)  # the dtype is told, and no value
            return
        _, rows, columns = piece.unpacked_shape(source.num_experts)
        index = expert if piece.expert is None and expert is not None else 0
        if (piece.name, index) not in self._seen:
            self._seen.add((piece.name, index))
            source.advance(piece.name, rows * columns)
        first = index * rows * columns
        if (rows, columns) == stack.matrix_shape and not piece.transposed:
            source.read_into(piece.name, first + begin, out)
        else:
            out[:] = self._lay_out(stack, slot, piece, first, out.dtype)[begin:][: len(out)]

    def _lay_out(self, stack: Stack, slot: int, piece: Piece, first: int, dtype: Any) -> Bits:
        """A matrix as its slot has it: not transposed, padded with zeros, its rows one by one."""
        if self._laid_out is None or self._laid_out[:2] != (stack, slot):
            _, rows, columns = piece.unpacked_shape(self._source.num_experts)
            values = np.empty(rows * columns, dtype)
            self._source.read_into(piece.name, first, values)
            matrix: Bits = np.zeros(stack.matrix_shape, dtype)
            matrix[:rows, :columns] = unpack_expert(values, piece, self._source.num_experts)
            self._laid_out = stack, slot, matrix.reshape(-1)
        return self._laid_out[2]


def _compare_slots(stack: Stack, matrices: _Matrices) -> dict[int, Difference]:
    """The first difference in each slot."""
    size = prod(stack.matrix_shape)

    def expected(begin: int, out: Bits) -> None:
        for slot, first, part in _parts(begin, out, size):
            matrices.read_into(stack, slot, first, part)

    def actual(begin: int, out: Bits) -> None:
        stack.file.read_into(stack.name, begin, out)

    differences: dict[int, Difference] = {}
    chunks = differing_chunks(expected, actual, prod(stack.shape), stack.item_size)
    for begin, wanted, found in chunks:
        both = zip(_parts(begin, wanted, size), _parts(begin, found, size), strict=True)
        for (slot, first, wanted_part), (_, _, found_part) in both:
            difference = first_of(first, wanted_part, found_part)
            if difference is not None:
                differences.setdefault(slot, difference)
    return differences


def _parts(begin: int, elements: Bits, size: int) -> Iterator[tuple[int, int, Bits]]:
    """Elements of a stack from `begin` on -> (slot, first element in it, elements of it)."""
    position = 0
    while position < len(elements):
        slot, first = divmod(begin + position, size)
        end = position + size - first
        yield slot, first, elements[position:end]
        position = end


def _other_dtype(found: str, expected: str) -> str:
    return f"dtype is torch.{found}, in the source torch.{expected}."


def capped(where: str, findings: Iterator[str]) -> Iterator[str]:
    """Prefix findings with their place; past the limit, only count them."""
    for finding in islice(findings, _MAX_FINDINGS_PER_TENSOR):
        yield f"{where}: {finding}"
    rest = sum(1 for _ in findings)
    if rest:
        yield f"{where}: {rest} more differences of this kind."
