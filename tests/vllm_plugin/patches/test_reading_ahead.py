"""Adapters that are read before an engine adds them: it goes on meanwhile, and serves what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.vllm_plugin.patches import reading_ahead
from tests.vllm_release import END_RELEASES, answers_of

RIGHT = [[], []]  # nothing wrong on any rank
READ, ADDED = "lorashard: to be read", "lorashard: was read"
BY_THREADS = ["lorashard", "lorashard"]  # on each rank one, and only once

each_release = pytest.mark.parametrize("release", END_RELEASES)


def answers(release: str) -> dict[str, Any]:
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.reading_ahead")
    return found


@each_release
@pytest.mark.parametrize("form", ["shards", "plain", "asynchronous"])
def test_requests_go_on_while_an_adapter_is_read_and_it_is_read_once(
    release: str, form: str
) -> None:
    expected = [True, True, [READ, ADDED], BY_THREADS, RIGHT, [[1, 2], [1, 2]]]
    assert answers(release)[form] == expected


@each_release
def test_one_that_cannot_be_read_is_refused_as_it_is_added_and_nothing_is_kept(
    release: str,
) -> None:
    said, left, is_back, wrong_once_repaired = answers(release)["fails"]
    refusal = "RuntimeError: Worker failed with error 'LoRA adapter 'a1': rank file ep-00001"
    assert said.startswith(refusal)
    assert left == [[[1], []], 2]
    assert (is_back, wrong_once_repaired) == (True, RIGHT)


@each_release
def test_what_was_read_for_a_request_that_ended_is_not_served_to_the_next(release: str) -> None:
    assert answers(release)["nobody comes"] == [RIGHT, [1, 1]]


@each_release
def test_of_two_at_once_the_second_does_not_wait_to_be_asked_for(release: str) -> None:
    assert answers(release)["two"] == [RIGHT, RIGHT, [[1, 2], [1, 2]]]


@each_release
def test_what_is_there_is_not_read_again_and_other_engines_are_not_asked(release: str) -> None:
    assert answers(release)["already there"] == [[READ, ADDED], [], ["no mark"]]


@each_release
def test_a_version_in_place_of_another_is_read_ahead_too(release: str) -> None:
    assert answers(release)["in place"] in (
        "not in this release",
        [RIGHT, BY_THREADS, [[None, 1]] * 2 + [[1, None]] * 2],
    )


@each_release
def test_layers_take_it_from_the_device_and_what_is_kept_is_in_host_memory(release: str) -> None:
    assert answers(release)["copied"] == [2, True, True, [None, None], RIGHT]


@each_release
def test_the_thread_that_reads_rests_between_layers_and_the_engines_does_not(release: str) -> None:
    assert answers(release)["rests"] == [["lorashard-read-ahead"], True, True]


@each_release
def test_packing_and_writing_are_done_before_the_step_that_adds_the_adapter(release: str) -> None:
    found = answers(release)["written ahead"]
    stages = [["pack", "write into the slot"]] * 2
    assert found == [True, ["lorashard-read-ahead"], [[None, 1], [None, 1]], RIGHT, stages]


@each_release
def test_a_slot_that_another_adapter_needs_is_that_ones_and_all_serve_their_own(
    release: str,
) -> None:
    ready, still_ready, served = answers(release)["slot taken"]
    assert (ready, still_ready) == ([True, True], [False, False])
    assert served == [RIGHT] * 4


@each_release
def test_without_a_free_slot_an_adapter_is_packed_ahead_and_written_as_it_is_added(
    release: str,
) -> None:
    packs, writes, first, other = answers(release)["no slot"]
    assert (packs, writes) == (["lorashard-read-ahead"], ["MainThread"])
    assert (first, other) == (RIGHT, RIGHT)


@pytest.mark.parametrize(
    ("last_s", "first"), [(0.0, 0.005), (0.004, 0.005), (0.04, 0.03), (9.0, 0.06)]
)
def test_the_server_asks_first_when_the_adapter_may_be_there(last_s: float, first: float) -> None:
    delays = list(reading_ahead._delays(last_s))
    assert delays[0] == pytest.approx(first)
    assert delays[1] == 0.005
    assert delays[1:-1] == sorted(delays[1:-1])
    assert max(delays) <= 0.06
    assert 590 < sum(delays) < 610
