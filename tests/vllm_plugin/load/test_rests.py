"""Rests of a thread: when they are due, and that other threads are as they were afterwards."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from lorashard.vllm_plugin.load.rests import rest_if_due, with_rests

USUAL_S = 0.004


@pytest.fixture(autouse=True)
def _usual_switches() -> object:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL_S)
    yield
    sys.setswitchinterval(before)


def work(seconds: float) -> None:
    """So much of the CPU, in this thread."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


def counted(answer: bool) -> tuple[list[int], Callable[[], bool]]:
    """What asks whether a rest is needed, and how often it was asked."""
    calls: list[int] = []

    def is_needed() -> bool:
        calls.append(1)
        return answer

    return calls, is_needed


def test_a_rest_is_as_long_as_the_work_before_it() -> None:
    calls, is_needed = counted(True)
    with with_rests(is_needed):
        work(0.003)
        began, used = time.perf_counter(), time.thread_time()
        rest_if_due()
        assert time.perf_counter() - began >= 0.003
        assert time.thread_time() - used < 0.003
        rest_if_due()  # nothing was done since
    assert len(calls) == 1


def test_no_rest_while_the_engine_takes_no_steps() -> None:
    calls, is_needed = counted(False)
    with with_rests(is_needed):
        for _ in range(3):
            work(0.001)
            rest_if_due()
    assert len(calls) == 3


def test_only_in_the_thread_that_asks_for_it() -> None:
    calls, is_needed = counted(True)

    def other() -> None:
        work(0.001)
        rest_if_due()

    with with_rests(is_needed), ThreadPoolExecutor(1) as pool:
        pool.submit(other).result()
    other()
    assert calls == []


def test_threads_switch_sooner_until_the_last_one_is_done() -> None:
    _, is_needed = counted(True)
    inside, may_end = threading.Event(), threading.Event()

    def other() -> None:
        with with_rests(is_needed):
            inside.set()
            may_end.wait(60)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(other)
        assert inside.wait(60)
        quick_s = sys.getswitchinterval()
        with with_rests(is_needed):
            assert sys.getswitchinterval() == quick_s
        assert sys.getswitchinterval() == quick_s < USUAL_S
        may_end.set()
        ended.result()
    assert sys.getswitchinterval() == pytest.approx(USUAL_S)


@pytest.mark.parametrize("before_s", [0.005, 0.0001])
def test_switches_are_never_slower_and_the_same_afterwards(before_s: float) -> None:
    sys.setswitchinterval(before_s)
    before_s = sys.getswitchinterval()
    for _ in range(5):
        with suppress(OSError), with_rests(lambda: True):
            assert sys.getswitchinterval() <= before_s
            raise OSError
        assert sys.getswitchinterval() == before_s
