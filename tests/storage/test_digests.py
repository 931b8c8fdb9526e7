"""Reading in steps: every byte once and in order, and its digest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3

from lorashard.errors import HeaderError
from lorashard.storage import digests
from lorashard.storage.digests import STEP_BYTES, digest_file, digest_of, read_in_steps
from lorashard.storage.local import LocalFile

CONTENT = random.Random(0).randbytes(2 * STEP_BYTES + 12_345)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[LocalFile]:
    (tmp_path / "file").write_bytes(CONTENT)
    with closing(LocalFile(tmp_path / "file")) as file:
        yield file


@pytest.mark.parametrize("step", [1, 7, 99, 100, 101, 1000])
def test_the_pieces_are_the_range_in_order_and_none_is_too_long(
    source: LocalFile, step: int
) -> None:
    buffer = memoryview(bytearray(step))
    pieces = [bytes(piece) for piece in read_in_steps(source, 50, 150, buffer)]
    assert b"".join(pieces) == CONTENT[50:150]
    assert [len(piece) for piece in pieces[:-1]] == [step] * (len(pieces) - 1)


def test_an_empty_range_reads_nothing(source: LocalFile) -> None:
    beyond = len(CONTENT) + 5
    assert list(read_in_steps(source, beyond, beyond, memoryview(bytearray(9)))) == []


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(digests, "LARGE_STEP_BYTES", STEP_BYTES)
    return int(request.param)


@pytest.mark.parametrize("place", ["tmp_path", "memory_path"])
def test_the_digest_of_a_file_is_that_of_its_bytes(
    request: pytest.FixtureRequest, place: str, threads: int
) -> None:
    path: Path = request.getfixturevalue(place) / "file"
    path.write_bytes(CONTENT)
    assert digest_file(path, threads) == blake3(CONTENT).hexdigest()


def test_the_digest_is_that_of_the_range_alone(source: LocalFile, threads: int) -> None:
    expected = blake3(CONTENT[10:-10]).hexdigest()
    found = digest_of(source, 10, len(CONTENT) - 10, lambda _: None, threads=threads)
    assert found == expected


def test_bytes_read_before_are_digested_first(source: LocalFile, threads: int) -> None:
    digest = digest_of(
        source, 100, len(CONTENT), lambda _: None, prefix=CONTENT[:100], threads=threads
    )
    assert digest == blake3(CONTENT).hexdigest()


def test_progress_adds_up_to_the_range_and_moves_with_each_step(
    source: LocalFile, threads: int
) -> None:
    steps: list[int] = []
    digest_of(source, 0, len(CONTENT), steps.append, threads=threads)
    assert steps == [STEP_BYTES, STEP_BYTES, 12_345]


def test_a_source_that_ends_early_gives_no_digest(source: LocalFile, threads: int) -> None:
    with pytest.raises(HeaderError, match=f"it ended at byte {len(CONTENT)} "):
        digest_of(source, 0, len(CONTENT) + 1, lambda _: None, threads=threads)
