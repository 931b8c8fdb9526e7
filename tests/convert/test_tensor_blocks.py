"""A tensor's bytes are the same in blocks of any size, in any order of axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from lorashard.adapter.modules import FactorStack
from lorashard.convert.peft_tensors import OutputFactor, OutputTensor, StackPart
from lorashard.convert.tensor_blocks import read_tensor_blocks
from lorashard.shards.plan import Target
from lorashard.storage.local import LocalFile

ROWS, COLS, EXPERTS = 5, 4, (2, 0, 1)
FIRST_BYTE = 3
STACK = FactorStack("m", "up_proj", "lora_B", "F16", ROWS, COLS, ())
NUMBERS = np.arange(1, 3 * ROWS * COLS + 1, dtype=np.uint16).reshape(3, ROWS, COLS)
SLOTS = {STACK.name: {e: Target(0, FIRST_BYTE + e * ROWS * COLS * 2) for e in range(3)}}

# name -> part of an output factor [10, 9]
PARTS = {
    "block": StackPart(STACK, range(3, 8), range(5), range(2, 6)),
    "to-every-other-row": StackPart(STACK, range(1, 10, 2), range(5), range(4)),
    "from-every-other-row": StackPart(STACK, range(4, 7), range(0, 5, 2), range(5, 9)),
    "some-columns": StackPart(STACK, range(5), range(5), range(3, 5)),
}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LocalFile]:
    (tmp_path / "file").write_bytes(bytes(FIRST_BYTE) + NUMBERS.tobytes())
    with closing(LocalFile(tmp_path / "file")) as opened:
        yield opened


def expected(parts: tuple[StackPart, ...], axes: str) -> bytes:
    factors = np.zeros((len(EXPERTS), 10, 9), np.uint16)
    for position, expert in enumerate(EXPERTS):
        for part in parts:
            for row, stack_row in zip(part.rows, part.stack_rows, strict=True):
                for stack_col, col in enumerate(part.cols):
                    factors[position, row, col] = NUMBERS[expert, stack_row, stack_col]
    return factors.transpose(["erc".index(axis) for axis in axes]).tobytes()


def tensor_of(parts: tuple[StackPart, ...], axes: str) -> OutputTensor:
    factor = OutputFactor(10, 9, "F16", parts)
    return OutputTensor("t", (), axes, EXPERTS, factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", ["".join(axes) for axes in permutations("erc")])
@pytest.mark.parametrize("name", PARTS)
def test_blocks_of_any_size_join_to_the_tensor(file: LocalFile, name: str, axes: str) -> None:
    parts = (PARTS[name],)
    for size in (1, 60, 120, 200, 10**6):
        blocks = read_tensor_blocks(tensor_of(parts, axes), SLOTS, [file], size, size)
        assert b"".join(blocks) == expected(parts, axes), size


def test_two_parts_fill_one_tensor(file: LocalFile) -> None:
    parts = (
        StackPart(STACK, range(0, 10, 2), range(5), range(4)),
        StackPart(STACK, range(1, 10, 2), range(5), range(4, 8)),
    )
    blocks = read_tensor_blocks(tensor_of(parts, "rce"), SLOTS, [file], 60, 60)
    assert b"".join(blocks) == expected(parts, "rce")


def test_a_block_is_as_large_as_it_may_be_and_never_cuts_the_slowest_axis(file: LocalFile) -> None:
    row = len(EXPERTS) * 9 * 2  # bytes of one row of all experts
    blocks = read_tensor_blocks(tensor_of((), "rce"), SLOTS, [file], 4 * row + 1, 1)
    assert [len(block) // row for block in blocks] == [4, 4, 2]
    blocks = read_tensor_blocks(tensor_of((), "rce"), SLOTS, [file], 1, 1)
    assert [len(block) for block in blocks] == [row] * 10


def test_what_no_part_fills_is_zero(file: LocalFile) -> None:
    (block,) = read_tensor_blocks(tensor_of((), "erc"), SLOTS, [file])
    assert bytes(block) == bytes(3 * 10 * 9 * 2)
