"""Which slot holds which adapter, on engines that hear the same."""

from __future__ import annotations

import functools
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.vllm_plugin.engine.agreed_slots import (
    MOST_NUMBER,
    Adapter,
    Announcement,
    Placement,
    SlotTable,
    num_rows,
    slot_share,
    union_of,
)

A, B, C, D = (Adapter.of(number, f"name{number}") for number in range(1, 5))


@given(
    st.integers(1, 70).flatmap(
        lambda slots: st.tuples(
            st.just(slots),
            st.builds(
                Announcement,
                st.lists(
                    st.builds(Adapter.of, st.integers(1, MOST_NUMBER), st.text(max_size=4)),
                    max_size=slots,
                    unique_by=lambda adapter: adapter.number,
                ).map(tuple),
                st.frozensets(st.integers(0, slots - 1)),
                st.frozensets(st.integers(0, slots - 1)),
                st.booleans(),
            ),
        )
    )
)
def test_what_is_said_arrives(case: tuple[int, Announcement]) -> None:
    num_slots, said = case
    rows = said.encode(num_slots)
    assert len(rows) == num_rows(num_slots)
    assert all(0 <= row < 1 << 30 for row in rows)  # int32, and one engine's column is 0 elsewhere
    assert Announcement.decode(rows, num_slots) == said


def test_new_adapters_get_the_first_free_slots_in_order() -> None:
    table, placements = SlotTable.empty(3).with_all((B, A))
    assert table.adapters == (A, B, None)
    assert placements == (Placement(0, A), Placement(1, B))


def test_an_adapter_stays_in_its_slot() -> None:
    table, _ = SlotTable.empty(2).with_all((B,))
    table, placements = table.with_all((A, B))
    assert table.adapters == (B, A)
    assert placements == (Placement(1, A),)
    assert table.with_all((A,))[1] == ()


def test_the_one_that_was_used_the_longest_ago_makes_room() -> None:
    table, _ = SlotTable.empty(2).with_all((A, B))
    table, _ = table.with_all((A,))
    table, placements = table.with_all((C,))
    assert placements == (Placement(1, C, evicted=B),)
    _, placements = table.with_all((B, C))
    assert placements == (Placement(0, B, evicted=A),)


def test_an_adapter_of_this_step_never_makes_room() -> None:
    table, _ = SlotTable.empty(2).with_all((A,))
    table, _ = table.with_all((B,))
    table, placements = table.with_all((A, C))  # A was used before B
    assert placements == (Placement(1, C, evicted=B),)
    assert table.adapters == (A, C)


def test_a_step_without_adapters_changes_no_slot() -> None:
    table, _ = SlotTable.empty(2).with_all((A, B))
    assert table.with_all(()) == (SlotTable(table.adapters, table.last_used, 2), ())


def test_a_slot_that_was_lost_is_the_first_to_be_filled() -> None:
    table, _ = SlotTable.empty(2).with_all((A, B))
    table = table.without({1})
    assert table.adapters == (A, None)
    assert table.with_all((A, C))[1] == (Placement(1, C),)


def test_a_slot_that_was_lost_is_filled_before_those_that_were_never_used() -> None:
    table, _ = SlotTable.empty(2).with_all((A,))
    assert table.without({0}).with_all((C,))[1] == (Placement(0, C),)


def test_each_bit_of_an_adapter_tells_names_apart() -> None:
    names = [Adapter.of(1, f"name{n}").name for n in range(200)]
    bits = (1 << 30) - 1
    assert functools.reduce(operator.or_, names) == bits
    assert functools.reduce(operator.or_, (bits ^ name for name in names)) == bits


def test_more_adapters_than_slots_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"use 3 adapters in one step, and --max-loras is 2"):
        SlotTable.empty(2).with_all((A, B, C))


def test_the_union_is_of_all_engines_in_order() -> None:
    said = (Announcement((C, B)), Announcement(), Announcement((B, A)))
    assert union_of(said, SlotTable.empty(3)) == (A, B, C)


def test_a_number_with_two_names_is_an_error() -> None:
    other = Adapter.of(A.number, "another name")
    with pytest.raises(ValueError, match="the number 1 is that of two adapters") as caught:
        union_of((Announcement((A,)), Announcement((other,))), SlotTable.empty(2))
    assert str(caught.value).endswith(
        ". Load an adapter on all data-parallel engines, under one name and number"
    )
    in_slot, _ = SlotTable.empty(2).with_all((A,))
    with pytest.raises(ValueError, match="the number 1 is that of two adapters"):
        union_of((Announcement((other,)),), in_slot)
    assert union_of((Announcement((other,)),), in_slot.without({0})) == (other,)


@given(st.integers(1, 20), st.integers(1, 20))
def test_shares_fit_and_leave_nothing(num_slots: int, num_engines: int) -> None:
    shares = [slot_share(num_slots, num_engines, engine) for engine in range(num_engines)]
    assert sum(shares) == num_slots
    assert max(shares) - min(shares) <= 1


@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(st.sets(st.sampled_from((A, B, C, D))), st.sets(st.integers(0, 4), max_size=2)),
        max_size=12,
    ),
)
def test_placements_alone_keep_slots_as_the_table_says(
    num_slots: int, steps: list[tuple[set[Adapter], set[int]]]
) -> None:
    table = SlotTable.empty(num_slots)
    slots: list[Adapter | None] = [None] * num_slots
    for wanted, lost in steps:
        for slot in lost:
            if slot < num_slots:
                table, slots[slot] = table.without({slot}), None
        union = tuple(sorted(wanted))[:num_slots]
        table, placements = table.with_all(union)
        for placement in placements:
            assert slots[placement.slot] == placement.evicted
            assert placement.evicted not in union
            slots[placement.slot] = placement.adapter
        assert tuple(slots) == table.adapters
        assert set(union) <= set(slots)
