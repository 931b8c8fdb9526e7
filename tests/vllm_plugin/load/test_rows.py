"""Which slots of which rank files a rank's experts are read from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.errors import PlacementError
from lorashard.shards.placement import linear_placement, round_robin_placement
from lorashard.vllm_plugin.load.rows import Run, find_copies, find_runs
from tests.strategies import rank_lists

Ranks = list[list[int]]


@st.composite
def wanted(draw: st.DrawFn) -> tuple[Ranks, list[int], int | None]:
    """A placement with redundant experts, the live experts in slot order, the own rank."""
    num_experts, ep_size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    ranks = draw(rank_lists(num_experts, ep_size))
    order = draw(st.one_of(st.permutations(range(num_experts)), st.just(list(range(num_experts)))))
    local = order[: draw(st.integers(0, num_experts))]
    return ranks, local, draw(st.none() | st.integers(0, ep_size - 1))


@settings(deadline=None)
@given(wanted())
def test_every_local_expert_comes_once_in_order_from_a_slot_that_holds_it(case) -> None:
    ranks, local, own = case
    found: list[int] = []
    for run in find_runs(ranks, local, own):
        assert run.count > 0
        assert run.dst_slot == len(found)
        found += ranks[run.ep_rank][run.src_slot : run.src_slot + run.count]
    assert found == local


@settings(deadline=None)
@given(wanted())
def test_what_the_own_file_holds_comes_from_it(case) -> None:
    ranks, local, own = case
    for run in find_runs(ranks, local, own):
        experts = local[run.dst_slot : run.dst_slot + run.count]
        if own is not None and run.ep_rank != own:
            assert not set(experts) & set(ranks[own])


@settings(deadline=None)
@given(wanted())
def test_neighbours_are_read_at_once(case) -> None:
    runs = find_runs(*case)
    for one, following in pairwise(runs):
        end = (one.ep_rank, one.src_slot + one.count)
        assert end != (following.ep_rank, following.src_slot)


@pytest.mark.parametrize("rule", [linear_placement, round_robin_placement])
@pytest.mark.parametrize("ep_rank", range(3))
def test_a_directory_cut_for_this_placement_is_one_run_of_the_own_file(rule, ep_rank: int) -> None:
    ranks = rule(8, 3).ranks
    runs = find_runs(ranks, ranks[ep_rank], ep_rank)
    assert runs == (Run(ep_rank, 0, 0, len(ranks[ep_rank])),)


def test_a_redundant_expert_of_another_file_is_not_preferred() -> None:
    assert find_runs([[0, 1], [1, 2]], [0, 1], 0) == (Run(0, 0, 0, 2),)
    assert find_runs([[0, 1], [1, 2]], [1, 2], 1) == (Run(1, 0, 0, 2),)


def test_neighbours_on_the_device_that_are_apart_in_the_file_are_two_runs() -> None:
    assert find_runs([[0, 1, 2, 3]], [0, 2], 0) == (Run(0, 0, 0, 1), Run(0, 2, 1, 1))
    assert find_runs([[0, 1]], [1, 0], 0) == (Run(0, 1, 0, 1), Run(0, 0, 1, 1))


def test_a_rank_without_experts_reads_nothing() -> None:
    assert find_runs([[0], [1], []], [], 2) == ()


def test_an_expert_that_stands_nowhere_is_refused() -> None:
    with pytest.raises(PlacementError, match="holds expert 3"):
        find_runs([[0, 1], [2]], [2, 3], 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12))
def test_an_expert_in_several_slots_is_read_once_and_copied_to_the_others(local: list[int]) -> None:
    ranks = [[5, 3, 1], [0, 2, 4]]
    slots: list[int | None] = [None] * len(local)
    for run in find_runs(ranks, local, None):
        for n in range(run.count):
            assert slots[run.dst_slot + n] is None
            slots[run.dst_slot + n] = ranks[run.ep_rank][run.src_slot + n]
    assert [e for e in slots if e is not None] == list(dict.fromkeys(local))
    for slot, first in find_copies(local):
        assert slots[slot] is None
        slots[slot] = slots[first]
    assert slots == local
