"""Reads cut and joined into blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.shards.plan import CopyRange, Rearrange, Target
from lorashard.writing.blocks import (
    CopyBlock,
    RearrangeBlock,
    Run,
    axis_sizes,
    find_runs,
    split_into_blocks,
)
from tests.plans import planned, plans, run


def copy(begin: int, end: int, offset: int = 0) -> CopyRange:
    return CopyRange(begin, end, (Target(0, offset), Target(1, offset + 1000)))


def rearrange(axes: str, begin: int = 0) -> Rearrange:
    """4 experts of [2, 3] in F16: 48 bytes."""
    slots = tuple((Target(0, 12 * e),) for e in range(4))
    return Rearrange(begin, begin + 48, axes, 2, 3, 2, 3, "F16", "F16", slots)


def test_neighbouring_copies_share_a_block() -> None:
    reads = (copy(0, 10), copy(10, 25), copy(25, 30))
    assert list(split_into_blocks(reads, 100)) == [CopyBlock(0, 30, reads)]


def test_a_gap_between_copies_begins_a_new_block() -> None:
    reads = (copy(0, 10), copy(11, 20))
    assert [(b.begin, b.end) for b in split_into_blocks(reads, 100)] == [(0, 10), (11, 20)]


def test_a_copy_that_no_longer_fits_begins_a_new_block() -> None:
    reads = (copy(0, 10), copy(10, 20), copy(20, 25))
    assert [(b.begin, b.end) for b in split_into_blocks(reads, 24)] == [(0, 20), (20, 25)]


def test_a_long_copy_is_cut_and_each_piece_goes_on_where_the_last_ended() -> None:
    (first, second, third) = split_into_blocks((copy(100, 125, offset=7),), 10)
    assert [(b.begin, b.end) for b in (first, second, third)] == [
        (100, 110),
        (110, 120),
        (120, 125),
    ]
    assert isinstance(second, CopyBlock)
    assert second.copies == (CopyRange(110, 120, (Target(0, 17), Target(1, 1017))),)


def test_aligned_blocks_end_at_multiples_of_their_size() -> None:
    reads = (copy(3, 8), copy(8, 9), copy(9, 35, offset=7), copy(35, 40), copy(40, 44))
    blocks = list(split_into_blocks(reads, 10, is_aligned=True))
    assert [(b.begin, b.end) for b in blocks] == [(3, 10), (10, 20), (20, 30), (30, 40), (40, 44)]
    first, second = blocks[:2]
    assert isinstance(first, CopyBlock)
    assert isinstance(second, CopyBlock)
    assert first.copies[2] == CopyRange(9, 10, (Target(0, 7), Target(1, 1007)))
    assert second.copies == (CopyRange(10, 20, (Target(0, 8), Target(1, 1008))),)


def test_what_lies_side_by_side_is_one_run() -> None:
    places = [
        (Target(1, 20), 0, 10), (Target(1, 0), 10, 20), (Target(1, 10), 40, 50),
        (Target(0, 30), 50, 55), (Target(1, 31), 60, 61),
    ]  # fmt: skip
    assert list(find_runs(places)) == [
        Run(Target(0, 30), ((50, 55),)),
        Run(Target(1, 0), ((10, 20), (40, 50), (0, 10))),
        Run(Target(1, 31), ((60, 61),)),
    ]
    assert list(find_runs([])) == []


@pytest.mark.parametrize(
    ("axes", "limit", "ranges"),
    [
        ("erc", 24, [(0, 2), (2, 4)]),  # an expert is 12 bytes
        ("rce", 24, [(0, 1), (1, 2)]),  # a row of all experts is 24
        ("rec", 1000, [(0, 2)]),
        ("erc", 30, [(0, 2), (2, 4)]),
        ("rce", 1, [(0, 1), (1, 2)]),  # one index is never cut
    ],
)
def test_a_rearrangement_is_cut_along_its_slowest_axis(
    axes: str, limit: int, ranges: list[tuple[int, int]]
) -> None:
    blocks = list(split_into_blocks((rearrange(axes, begin=10),), limit, 1))
    assert [(b.first, b.last) for b in blocks if isinstance(b, RearrangeBlock)] == ranges
    unit = 48 // {"e": 4, "r": 2, "c": 3}[axes[0]]
    assert [(b.begin, b.end) for b in blocks] == [(10 + unit * a, 10 + unit * b) for a, b in ranges]


def test_columns_have_a_limit_of_their_own() -> None:
    blocks = list(split_into_blocks((rearrange("cre"),), 1, 32))  # a column is 16 bytes
    assert [(b.begin, b.end) for b in blocks] == [(0, 32), (32, 48)]


def test_copies_before_and_after_a_rearrangement_are_not_joined() -> None:
    reads = (copy(0, 10), rearrange("erc", begin=10), copy(58, 60))
    blocks = list(split_into_blocks(reads, 1000))
    assert [(type(b), b.begin, b.end) for b in blocks] == [
        (CopyBlock, 0, 10),
        (RearrangeBlock, 10, 58),
        (CopyBlock, 58, 60),
    ]


def test_nothing_to_read_is_no_block() -> None:
    assert list(split_into_blocks(())) == []


def test_axes_have_the_sizes_of_the_source() -> None:
    assert axis_sizes(rearrange("erc")) == {"e": 4, "r": 2, "c": 3}


@given(case=plans(), block_bytes=st.integers(1, 300), column_bytes=st.integers(1, 300))
@run
def test_blocks_cover_the_reads_in_source_order(case, block_bytes, column_bytes):
    plan = planned(*case)
    blocks = list(split_into_blocks(plan.reads, block_bytes, column_bytes))
    assert all(a.end == b.begin for a, b in pairwise(blocks))
    assert (blocks[0].begin, blocks[-1].end) == (plan.reads[0].begin, plan.reads[-1].end)


@given(case=plans(), block_bytes=st.integers(1, 300), column_bytes=st.integers(1, 300))
@run
def test_no_block_is_larger_than_its_limit_or_one_index(case, block_bytes, column_bytes):
    for block in split_into_blocks(planned(*case).reads, block_bytes, column_bytes):
        size = block.end - block.begin
        if isinstance(block, CopyBlock):
            assert size <= block_bytes
        else:
            limit = column_bytes if block.op.axes[0] == "c" else block_bytes
            assert size <= limit or block.last - block.first == 1


@given(case=plans(), block_bytes=st.integers(1, 300))
@run
def test_the_copies_of_a_block_fill_it(case, block_bytes):
    for block in split_into_blocks(planned(*case).reads, block_bytes):
        if isinstance(block, CopyBlock):
            edges = [(0, block.begin), *((c.begin, c.end) for c in block.copies), (block.end, 0)]
            assert all(a[1] == b[0] for a, b in pairwise(edges))


@given(case=plans(), block_bytes=st.integers(1, 300))
@run
def test_cut_copies_still_reach_the_same_places(case, block_bytes):
    plan = planned(*case)
    whole = {
        (begin, Target(target.file, target.offset + begin - op.begin))
        for op in plan.reads if isinstance(op, CopyRange)
        for begin in range(op.begin, op.end) for target in op.targets
    }  # fmt: skip
    cut = {
        (begin, Target(target.file, target.offset + begin - copy.begin))
        for block in split_into_blocks(plan.reads, block_bytes) if isinstance(block, CopyBlock)
        for copy in block.copies
        for begin in range(copy.begin, copy.end) for target in copy.targets
    }  # fmt: skip
    assert cut == whole
