"""Rests of a thread that reads an adapter while the engine takes steps.

Python runs one thread at a time. The engine's thread lets another one run at each operation of torch's,
and goes on when that one waits, or has run for sys.getswitchinterval(), 5 ms. So a thread that computes
for 10 ms keeps one step waiting for as long. With rests in between, several steps take a little longer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WORK_S = 0.0005  # after which a rest is due; it is as long as the work was
_LONGEST_S = 0.005
_SWITCH_S = 0.0005  # for what cannot be interrupted by a rest


class _OfThread(threading.local):
    """since: this thread's CPU time when it rested last; None in a thread that does not rest."""

    since: float | None = None
    is_needed: Callable[[], bool]


class _QuickSwitches:
    """Threads that compute are interrupted sooner, as long as anybody is in here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._usual_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._usual_s = sys.getswitchinterval()
                _set_switches(min(self._usual_s, _SWITCH_S))
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                _set_switches(self._usual_s)


def _set_switches(interval_s: float) -> None:
    # Python cuts whole microseconds off, those it has told included: 99 becomes 98.
    sys.setswitchinterval(interval_s + 1e-7)


_of_thread = _OfThread()
_quick_switches = _QuickSwitches()


@contextmanager
def with_rests(is_needed: Callable[[], bool]) -> Iterator[None]:
    """In here, `rest_if_due` rests. is_needed: whether the engine takes steps, asked before each rest."""
    _of_thread.since, _of_thread.is_needed = time.thread_time(), is_needed
    try:
        with _quick_switches:
            yield
    finally:
        _of_thread.since = None


def rest_if_due() -> None:
    """To be called now and then. Does nothing in a thread that is not in `with_rests`."""
    if _of_thread.since is None:
        return
    worked_s = time.thread_time() - _of_thread.since
    if worked_s >= _WORK_S:
        if _of_thread.is_needed():
            time.sleep(min(worked_s, _LONGEST_S))
        _of_thread.since = time.thread_time()
