"""Concurrent jobs: one that fails does not end the others, and an interruption ends them all."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing

import pytest

from lorashard.errors import AdapterError, LorashardError
from lorashard.progress import Progress
from lorashard.storage.parallel import (
    Outcome,
    cancellable_pool,
    in_order,
    one_ahead,
    run_concurrently,
)


def test_outcomes_are_in_the_order_of_the_jobs_whatever_ends_first() -> None:
    ended: list[str] = []
    second_has_ended = threading.Event()

    def work(name: str, _: Progress) -> str:
        if name == "first":
            assert second_has_ended.wait(10)
        return name.upper()

    def finished(outcome: Outcome[str, str]) -> None:
        ended.append(outcome.job)
        second_has_ended.set()

    outcomes = run_concurrently(("first", "second"), work, workers=2, finished=finished)
    assert [outcome.result for outcome in outcomes] == ["FIRST", "SECOND"]
    assert ended == ["second", "first"]


def test_a_failure_is_recorded_and_the_others_continue() -> None:
    refused = AdapterError("b: no.")

    def work(name: str, _: Progress) -> str:
        if name == "b":
            raise refused
        return name.upper()

    outcomes = run_concurrently("abc", work, workers=1, finished=lambda _: None)
    assert outcomes == (
        Outcome("a", "A", None),
        Outcome("b", None, refused),
        Outcome("c", "C", None),
    )


def test_an_unexpected_error_names_its_job_and_keeps_where_it_happened() -> None:
    def work(_name: str, _: Progress) -> None:
        {}["missing"]

    (outcome,) = run_concurrently(("a",), work, workers=1, finished=lambda _: None)
    assert isinstance(outcome.error, LorashardError)
    assert str(outcome.error) == "a: unexpected KeyError: 'missing'"
    assert outcome.error.exit_code == 1
    assert '{}["missing"]' in "".join(traceback.format_exception(outcome.error))


def test_as_many_jobs_run_at_once_as_there_are_workers() -> None:
    running, most, lock = set(), [0], threading.Lock()
    all_three = threading.Barrier(3, timeout=10)

    def work(number: int, _: Progress) -> None:
        with lock:
            running.add(number)
            most[0] = max(most[0], len(running))
        if number < 3:
            all_three.wait()
        with lock:
            running.discard(number)

    run_concurrently(range(12), work, workers=3, finished=lambda _: None)
    assert most[0] == 3


def test_an_interruption_ends_running_jobs_and_starts_no_more() -> None:
    started: list[str] = []
    under_way = threading.Event()

    def work(name: str, progress: Progress) -> None:
        started.append(name)
        if name == "first":
            under_way.wait(10)
            return
        under_way.set()
        while True:  # ends only where progress is reported
            time.sleep(0.001)
            progress(1)

    def finished(_: Outcome[str, None]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_concurrently(
            ("first", "endless", "endless", "never"), work, workers=2, finished=finished
        )
    assert "never" not in started


def test_a_signal_that_another_thread_gets_interrupts_at_once() -> None:
    def work(_name: str, progress: Progress) -> None:
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # not to the thread that waits
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)
            progress(1)
        completed.append(True)

    completed: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        run_concurrently(("long",), work, workers=1, finished=lambda _: None)
    assert completed == []


def test_what_finished_raises_is_raised_and_not_recorded() -> None:
    def finished(outcome: Outcome[str, str]) -> None:
        raise AdapterError(f"{outcome.job} is enough.")

    with pytest.raises(AdapterError, match="a is enough"):
        run_concurrently(("a",), lambda name, _: name, workers=1, finished=finished)


def test_the_next_item_is_made_while_the_caller_works_with_one() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for item in one_ahead(items()):
        seen.append(item)
        assert made[min(item + 1, 2)].wait(10)
        assert not any(event.is_set() for event in made[item + 2 :])
    assert seen == [0, 1, 2]


def test_items_that_are_false_or_none_are_items_and_no_items_are_none() -> None:
    assert list(one_ahead(iter([0, None, [], 1]))) == [0, None, [], 1]
    assert list(one_ahead(iter(()))) == []


def test_an_error_while_an_item_is_made_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise AdapterError("no second one.")

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(AdapterError, match="no second one"):
        next(ahead)


def test_its_thread_ends_when_it_is_closed_early() -> None:
    before = threading.active_count()
    with closing(one_ahead(iter(range(5)))) as items:
        assert next(items) == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_results_in_order_are_those_of_map_whatever_ends_first() -> None:
    second_has_ended = threading.Event()

    def work(name: str) -> str:
        if name == "first":
            assert second_has_ended.wait(10)
        second_has_ended.set()
        return name.upper()

    with cancellable_pool(2) as (pool, _):
        assert list(in_order(pool, work, ("first", "second"), ahead=2)) == ["FIRST", "SECOND"]


def test_results_in_order_are_made_only_so_far_ahead() -> None:
    begun: list[int] = []
    with (
        cancellable_pool(2) as (pool, _),
        closing(in_order(pool, begun.append, iter(range(100)), ahead=3)) as results,
    ):
        next(results)
    assert set(begun) <= {0, 1, 2, 3}


def test_an_error_of_one_job_comes_in_its_turn() -> None:
    def work(number: int) -> int:
        if number == 1:
            raise AdapterError("1: no.")
        return number

    with cancellable_pool(2) as (pool, _):
        results = in_order(pool, work, range(3), ahead=2)
        assert next(results) == 0
        with pytest.raises(AdapterError, match="1: no"):
            next(results)
