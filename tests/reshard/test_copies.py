"""Copies are compared while their files pass by, however the bytes are cut."""

from __future__ import annotations

import pytest

from lorashard.reshard.copies import CopyDigests
from lorashard.reshard.moves import Stretch
from lorashard.shards.plan import Target

FILES = (b"..abcd....efgh", b"abcdefgh......", b"....abcX......")
SAME = (Stretch(0, 2, 6), Stretch(1, 0, 4))
OTHER = (Stretch(0, 10, 14), Stretch(1, 4, 8))
DIFFERENT = (*SAME, Stretch(2, 4, 8))


def different(copies: list[tuple[Stretch, ...]], step: int) -> list[Target]:
    digests = CopyDigests(copies, len(FILES))
    for begin in range(0, 14, step):  # the files in turns, as stacks are read
        for number, content in enumerate(FILES):
            digests.update(number, memoryview(content)[begin : begin + step], begin)
    return [target for target, _ in digests.find_different()]


@pytest.mark.parametrize("step", range(1, 15))
def test_a_copy_that_differs_is_named_and_others_are_not(step: int) -> None:
    assert different([SAME, OTHER], step) == []
    assert different([OTHER, DIFFERENT], step) == [Target(2, 4)]


def test_nothing_is_compared_where_there_are_no_copies() -> None:
    assert different([], 3) == []
