"""Parts of a list are disjoint, complete, and as equal as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.errors import AdapterError
from lorashard.split.parts import Part, parse_part


@given(st.lists(st.integers(), unique=True), st.integers(1, 20))
def test_each_item_is_in_one_part(items: list[int], count: int) -> None:
    parts = [Part(index, count).of(items) for index in range(count)]
    assert sorted(item for part in parts for item in part) == sorted(items)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(), unique=True), st.integers(1, 20))
def test_a_part_keeps_the_order_of_the_list(items: list[int], count: int) -> None:
    for index in range(count):
        part = Part(index, count).of(items)
        assert [items.index(item) for item in part] == sorted(map(items.index, part))


def test_neighbours_go_to_different_parts() -> None:
    assert Part(1, 3).of("abcdefgh") == ("b", "e", "h")


@pytest.mark.parametrize(
    "text", ["", "1", "1/", "/2", "a/2", "-1/2", "1/2/3", "0.5/2", "1 / 2", "٣/٤"]
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(AdapterError, match="is not a part"):
        parse_part(text)


@pytest.mark.parametrize("text", ["8/8", "0/0", "9/8"])
def test_a_part_that_does_not_exist_is_refused_with_the_way_they_are_numbered(text: str) -> None:
    with pytest.raises(AdapterError, match=f"no part {text}") as caught:
        parse_part(text)
    assert "the last 7/8" in str(caught.value)


def test_parts_are_written_as_they_are_read() -> None:
    assert parse_part("0/1") == Part(0, 1)
    assert parse_part("07/8") == Part(7, 8)
