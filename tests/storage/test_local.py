"""Local files: exact reads, complete writes, and what is said when there is less than expected."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from lorashard.errors import HeaderError
from lorashard.storage.local import (
    LocalFile,
    SequentialWriter,
    SharedWriter,
    read_at,
    sync_all,
    sync_directory,
    write_all,
    write_new,
    write_pieces,
)

CONTENT = random.Random(0).randbytes(100_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@pytest.fixture
def source(path: Path) -> Iterator[LocalFile]:
    with closing(LocalFile(path)) as file:
        yield file


@pytest.mark.parametrize(("begin", "end"), [(0, 100_000), (0, 1), (99_999, 100_000), (7, 7)])
def test_a_range_is_read_exactly(source: LocalFile, begin: int, end: int) -> None:
    buffer = bytearray(end - begin)
    source.read_into(memoryview(buffer), begin)
    assert buffer == CONTENT[begin:end]


def test_reads_in_any_order_give_the_same_bytes(source: LocalFile) -> None:
    for begin in (0, 1000, 2000, 500, 99_000, 0):
        buffer = bytearray(1000)
        source.read_into(memoryview(buffer), begin)
        assert buffer == CONTENT[begin : begin + 1000]


def test_a_file_that_ends_early_says_where(source: LocalFile) -> None:
    with pytest.raises(HeaderError, match="it ended at byte 100000 while being read"):
        source.read_into(memoryview(bytearray(2)), 99_999)


def test_a_file_that_shrinks_after_opening_is_noticed(source: LocalFile, path: Path) -> None:
    os.truncate(path, 10)
    with pytest.raises(HeaderError, match="it ended at byte 10 "):
        source.read_into(memoryview(bytearray(20)), 0)


def test_a_missing_file_is_a_header_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="No such file") as raised:
        LocalFile(tmp_path / "none")
    assert raised.value.path == str(tmp_path / "none")


def test_read_at_says_how_many_bytes_there_were(path: Path) -> None:
    with path.open("rb") as file:
        assert read_at(file.fileno(), memoryview(bytearray(10)), 99_995) == 5
        assert read_at(file.fileno(), memoryview(bytearray(10)), 200_000) == 0


def test_write_all_changes_only_its_own_range(path: Path) -> None:
    with path.open("r+b") as file:
        write_all(file.fileno(), memoryview(b"new"), 50)
    assert path.read_bytes() == CONTENT[:50] + b"new" + CONTENT[53:]


@pytest.mark.parametrize("count", [0, 1, 5, 3000])
def test_many_buffers_are_read_and_written_as_one(path: Path, count: int) -> None:
    pieces = [memoryview(bytearray(number % 40)) for number in range(count)]
    size = sum(map(len, pieces))
    with closing(LocalFile(path)) as file:
        file.read_pieces(pieces, 100)
    assert b"".join(pieces) == CONTENT[100 : 100 + size]
    with path.open("r+b") as file:
        SharedWriter(file.fileno()).write(pieces, 7)
    assert path.read_bytes() == CONTENT[:7] + CONTENT[100 : 100 + size] + CONTENT[7 + size :]


@pytest.mark.parametrize("sizes", [(700_000,), (3, 700_000, 5), (200_000, 200_000, 9, 0, 7)])
def test_long_buffers_are_written_whole_and_in_order(path: Path, sizes: tuple[int, ...]) -> None:
    pieces = [memoryview(random.Random(size).randbytes(size)) for size in sizes]
    with path.open("r+b") as file:
        write_pieces(file.fileno(), pieces, 7)
    assert path.read_bytes() == CONTENT[:7] + b"".join(pieces)


@pytest.mark.parametrize("at_once", [1, 10, 99])
def test_buffers_of_which_the_kernel_takes_only_some_are_read_and_written_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def some(buffers: Sequence[memoryview]) -> list[memoryview]:
        (first, *_) = [buffer for buffer in buffers if buffer]
        return [first[:at_once]]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, some(buffers), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, some(buffers), at))
    pieces = [memoryview(bytearray(30)) for _ in range(4)]
    with closing(LocalFile(path)) as file:
        file.read_pieces(pieces, 100)
    assert b"".join(pieces) == CONTENT[100:220]
    with path.open("r+b") as file:
        write_pieces(file.fileno(), pieces, 7)
    assert path.read_bytes() == CONTENT[:7] + CONTENT[100:220] + CONTENT[127:]


def test_buffers_beyond_the_end_of_a_file_are_an_error(path: Path) -> None:
    with (
        closing(LocalFile(path)) as file,
        pytest.raises(HeaderError, match=f"it ended at byte {len(CONTENT)} "),
    ):
        file.read_pieces([memoryview(bytearray(3)), memoryview(bytearray(3))], len(CONTENT) - 4)


def test_pieces_are_written_one_behind_the_other(tmp_path: Path) -> None:
    pieces = [b"", CONTENT, b"x", 15 * CONTENT, CONTENT[:7]]
    with (tmp_path / "new").open("xb") as file:
        writer = SequentialWriter(file.fileno())
        for piece in pieces:
            writer.write(memoryview(piece))
        assert writer.size_bytes == sum(map(len, pieces))
    assert (tmp_path / "new").read_bytes() == b"".join(pieces)


def test_a_synced_file_is_never_written_over_another(path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_new(path, b"new")
    assert path.read_bytes() == CONTENT


def test_an_fsync_that_fails_is_not_passed_over(path: Path) -> None:
    with path.open("rb") as good:
        closed = os.open(path, os.O_RDONLY)
        os.close(closed)
        with pytest.raises(OSError, match="Bad file descriptor"):
            sync_all([good.fileno(), closed])


def test_only_a_directory_is_synced_as_one(path: Path) -> None:
    sync_directory(path.parent)
    with pytest.raises(NotADirectoryError):
        sync_directory(path)
