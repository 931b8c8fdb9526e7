"""Ranks that meet in a store, in threads with a TCP store each: one of them may come late, or never."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.vllm_plugin.load.agreement import Outcome, do_together
from lorashard.vllm_plugin.load.bounded_exchange import Meetings

RANKS = 3
LIMIT = timedelta(seconds=0.5)
NOT_THERE = "did not come to add it within"
ABSENT, FAILS, ADDS = "absent", "fails", "adds"


@pytest.fixture
def ranks() -> list[Meetings]:
    return make_group()


def make_group() -> list[Meetings]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(1, RANKS)]
    stores = [dist.PrefixStore("group", store) for store in (server, *others)]
    return [Meetings(store, rank, RANKS, LIMIT) for rank, store in enumerate(stores)]


def add(meetings: Meetings, how: str, name: str = "adapter 1") -> str:
    """What a rank gets of it."""
    if how == ABSENT:
        return ABSENT

    def adding() -> str:
        if how == FAILS:
            raise OSError(f"rank {meetings.rank} fails")
        return ADDS

    try:
        return do_together(adding, meetings.about(name))
    except (OSError, ValueError) as err:
        return str(err)


def all_at_once(do: Callable[[int], str]) -> list[str]:
    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(do, range(RANKS)))


def test_all_come_and_hear_each_other(ranks: list[Meetings]) -> None:

    def meet(rank: int) -> Any:
        exchange = ranks[rank].about("adapter 1")
        exchange.say(Outcome(held=(rank,)))
        exchange.say(Outcome("said later"))
        assert exchange.has_said
        return exchange.hear()

    expected = tuple(Outcome(held=(rank,)) for rank in range(RANKS))
    assert all_at_once(meet) == [expected] * RANKS


def test_a_rank_that_never_comes_is_named_in_time_and_the_next_meeting_works(
    ranks: list[Meetings],
) -> None:
    began = time.monotonic()
    found = all_at_once(lambda rank: add(ranks[rank], ABSENT if rank == 1 else ADDS))
    assert time.monotonic() - began < 20 * LIMIT.total_seconds()
    assert found[1] == ABSENT
    message = "Another rank could not load the adapter (rule ranks-differ): rank 1 of the tensor-parallel group"
    assert found[0] == found[2] == f"{message} {NOT_THERE} 0.5 s"
    for _ in range(2):
        assert all_at_once(lambda rank: add(ranks[rank], ADDS)) == [ADDS] * RANKS


def test_a_rank_that_comes_too_late_fails_as_well(ranks: list[Meetings]) -> None:

    def add_late(rank: int) -> str:
        if rank == 2:
            time.sleep(3 * LIMIT.total_seconds())
        return add(ranks[rank], ADDS)

    assert all(NOT_THERE in found for found in all_at_once(add_late))
    assert all_at_once(lambda rank: add(ranks[rank], ADDS)) == [ADDS] * RANKS


def test_what_was_said_is_removed_when_all_have_read_it(ranks: list[Meetings]) -> None:
    for number in range(20):
        all_at_once(lambda rank, name=f"adapter {number}": add(ranks[rank], ADDS, name))
    assert ranks[0].store.num_keys() < 2 * (RANKS + 1) + 4  # a store keeps some of its own


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([ABSENT, FAILS, ADDS]), min_size=RANKS, max_size=RANKS), max_size=4
    )
)
def test_whatever_ranks_do_all_that_come_get_the_same_and_then_all_meet(
    calls: list[list[str]],
) -> None:
    ranks = make_group()
    for call in calls:
        found = all_at_once(lambda rank, call=call: add(ranks[rank], call[rank]))
        came = [result for result, how in zip(found, call, strict=True) if how != ABSENT]
        succeeded = [result == ADDS for result in came]
        assert all(succeeded) or not any(succeeded)
        assert all(succeeded) == (set(call) <= {ADDS} or not came)
    assert all_at_once(lambda rank: add(ranks[rank], ADDS)) == [ADDS] * RANKS
