"""Mapped files: what is written where, and which files are mapped."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from lorashard.storage.mapped import MappedWriter, has_all_pages

CONTENT = random.Random(0).randbytes(5 * mmap.PAGESIZE + 123)


@pytest.fixture
def fd(memory_path: Path) -> Iterator[int]:
    fd = os.open(memory_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, CONTENT, 0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "sizes"),
    [(0, [len(CONTENT)]), (0, [1]), (len(CONTENT) - 1, [1]), (4090, [3, 0, 10, 5000]), (77, [])],
)
def test_the_pieces_are_written_and_nothing_else(fd: int, offset: int, sizes: list[int]) -> None:
    pieces = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    with closing(MappedWriter(fd)) as writer:
        writer.write([memoryview(piece) for piece in pieces], offset)
    new = b"".join(pieces)
    expected = CONTENT[:offset] + new + CONTENT[offset + len(new) :]
    assert os.pread(fd, len(CONTENT) + 1, 0) == expected


def test_several_threads_write_beside_each_other(fd: int) -> None:
    new = random.Random(1).randbytes(len(CONTENT))
    cuts = sorted(random.Random(2).sample(range(1, len(new)), 200))
    ranges = list(zip([0, *cuts], [*cuts, len(new)]))
    with closing(MappedWriter(fd)) as writer, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda r: writer.write([memoryview(new)[r[0] : r[1]]], r[0]), ranges))
    assert os.pread(fd, len(new) + 1, 0) == new


def test_a_file_with_holes_or_of_another_size_is_not_mapped(fd: int) -> None:
    assert has_all_pages(fd, len(CONTENT))
    assert not has_all_pages(fd, len(CONTENT) - 1)
    assert not has_all_pages(fd, len(CONTENT) + 1)
    size = 20 * mmap.PAGESIZE
    os.truncate(fd, size)
    assert not has_all_pages(fd, size)
    os.truncate(fd, 0)
    assert not has_all_pages(fd, 0)


def test_a_page_that_is_missing_after_all_is_an_error_and_ends_no_process(fd: int) -> None:
    with closing(MappedWriter(fd)) as writer:
        os.truncate(fd, mmap.PAGESIZE)
        with pytest.raises(OSError, match=r"Bad address|Cannot allocate|out of memory"):
            writer.write([memoryview(b"new")], 3 * mmap.PAGESIZE)
