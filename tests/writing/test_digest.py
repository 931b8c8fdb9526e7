"""Digests of files that are still being written."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given

from lorashard.shards.plan import CopyRange, FilePlan, ShardPlan, Target, ZeroFill
from lorashard.writing.digest import BackgroundHasher, Milestone, find_milestones
from tests.plans import planned, plans, run

MIB = 2**20


def plan(*reads: CopyRange, sizes: tuple[int, ...], zeros: tuple[ZeroFill, ...] = ()) -> ShardPlan:
    files = tuple(FilePlan(f"file-{i}", b"head", size, ()) for i, size in enumerate(sizes))
    return ShardPlan(files, reads, zeros)


def to(file: int, offset: int) -> tuple[Target, ...]:
    return (Target(file, offset),)


def test_a_file_is_final_up_to_where_nothing_before_is_missing() -> None:
    # The second read fills the front of the file, so that nothing is final before it is done.
    reads = (CopyRange(0, 10, to(0, 14)), CopyRange(10, 20, to(0, 4)), CopyRange(20, 30, to(0, 24)))
    assert find_milestones(plan(*reads, sizes=(34,))) == (
        (Milestone(0, 4), Milestone(20, 24), Milestone(30, 34)),
    )


def test_zeros_are_final_from_the_start_and_each_file_has_its_own_milestones() -> None:
    reads = (CopyRange(0, 10, (Target(0, 4), Target(1, 14))),)
    zeros = (ZeroFill(Target(1, 4), 10),)
    assert find_milestones(plan(*reads, sizes=(14, 24), zeros=zeros)) == (
        (Milestone(0, 4), Milestone(10, 14)),
        (Milestone(0, 14), Milestone(10, 24)),
    )


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[list[int]]:
    opened = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(2)]
    yield opened
    for fd in opened:
        with suppress(OSError):
            os.close(fd)


def test_the_digests_are_those_of_the_finished_files(fds: list[int]) -> None:
    """Blocks are written in source order, which is back to front in the second file."""
    content = random.Random(0).randbytes(5 * MIB)
    reads = [
        CopyRange(k * MIB, (k + 1) * MIB, (Target(0, 4 + k * MIB), Target(1, 4 + (4 - k) * MIB)))
        for k in range(5)
    ]
    two = plan(*reads, sizes=(4 + 5 * MIB, 4 + 5 * MIB))
    with BackgroundHasher(fds, two) as hasher:
        for fd in fds:
            os.pwrite(fd, b"head", 0)
        for read in reads:
            for target in read.targets:
                os.pwrite(fds[target.file], content[read.begin : read.end], target.offset)
            hasher.advance(read.end)
        digests = hasher.finish()
    pieces = [content[k * MIB : (k + 1) * MIB] for k in range(5)]
    assert digests == (
        blake3(b"head" + content).hexdigest(),
        blake3(b"head" + b"".join(reversed(pieces))).hexdigest(),
    )


def test_a_file_that_becomes_shorter_is_an_error_of_finish(fds: list[int]) -> None:
    one = plan(CopyRange(0, 10, to(0, 4)), sizes=(14,))
    os.pwrite(fds[0], b"head" + bytes(5), 0)
    with BackgroundHasher(fds[:1], one) as hasher:
        hasher.advance(10)
        with pytest.raises(OSError, match="became shorter"):
            hasher.finish()


def test_without_finish_the_thread_ends_with_the_block(fds: list[int]) -> None:
    one = plan(CopyRange(0, 10, to(0, 4)), sizes=(14,))
    with BackgroundHasher(fds[:1], one):
        pass
    assert not [t for t in threading.enumerate() if t.name == "lorashard-digest"]


@given(case=plans())
@run
def test_milestones_ascend_to_the_end_of_the_file(case):
    plan = planned(*case)
    for file, milestones in zip(plan.files, find_milestones(plan), strict=True):
        assert all(
            a.source_end < b.source_end and a.dest_end < b.dest_end for a, b in pairwise(milestones)
        )
        assert milestones[-1].dest_end == file.size_bytes


@given(case=plans())
@run
def test_a_milestone_comes_when_the_last_byte_before_it_is_there(case):
    plan = planned(*case)
    for number, milestones in enumerate(find_milestones(plan)):
        for milestone in milestones:
            needed = [0]
            for op in plan.reads:
                slots = (op.targets,) if isinstance(op, CopyRange) else op.targets
                places = [t.offset for targets in slots for t in targets if t.file == number]
                if any(offset < milestone.dest_end for offset in places):
                    needed.append(op.end)
            assert milestone.source_end == max(needed)
