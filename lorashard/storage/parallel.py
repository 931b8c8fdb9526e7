"""Run jobs concurrently: `run_concurrently` records failures, and the other jobs continue.

In: jobs and a function to call for each. Out: one `Outcome` for each job, in the order of the jobs.
`in_order` and `one_ahead` are for results and items that are needed one after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorashard.errors import AdapterError, LorashardError
from lorashard.progress import Progress
from lorashard.storage.system_errors import describe

# A signal may reach another thread than the one that waits, which then sleeps on until it wakes by
# itself. Python runs the handler in the main thread only.
_WAKE_S = 0.1

J = TypeVar("J")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[J, T]):
    """How one job ended: with a result, or an error."""

    job: J
    result: T | None
    error: LorashardError | None


def run_concurrently(
    jobs: Sequence[J],
    work: Callable[[J, Progress], T],
    *,
    workers: int,
    finished: Callable[[Outcome[J, T]], None],
) -> tuple[Outcome[J, T], ...]:
    """Call `work` for each job in `workers` threads.

    work: must call its Progress regularly, since that is where it is cancelled when this thread is
    interrupted. finished: called in this thread as each job ends; if it raises, the other jobs are
    cancelled.
    """
    with cancellable_pool(workers) as (pool, progress):
        futures = [pool.submit(_run_one, job, work, progress) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_WAKE_S, return_when=FIRST_COMPLETED)
            for future in done:
                finished(future.result())
    return tuple(future.result() for future in futures)


@contextmanager
def cancellable_pool(
    workers: int, progress: Progress = lambda _: None
) -> Iterator[tuple[ThreadPoolExecutor, Progress]]:
    """Threads, and a Progress for what they run: it ends them if the block ends with an exception.

    progress: called by that one.
    """
    cancelled = threading.Event()

    def advance(done: int) -> None:
        if cancelled.is_set():
            raise _CancelledError
        progress(done)

    with ThreadPoolExecutor(workers, thread_name_prefix="lorashard") as pool:
        try:
            yield pool, advance
        except BaseException:
            cancelled.set()
            pool.shutdown(cancel_futures=True)
            raise


def result_of(future: Future[T]) -> T:
    """The result of a future, for a thread that signals must be able to interrupt."""
    while not wait([future], timeout=_WAKE_S).done:
        pass
    return future.result()


def in_order(
    pool: Executor, work: Callable[[J], T], jobs: Iterable[J], *, ahead: int
) -> Generator[T, None, None]:
    """`map(work, jobs)` in the threads of a pool, which are at most `ahead` jobs ahead.

    If the caller takes no more, jobs that have not begun never do.
    """
    begun: deque[Future[T]] = deque()
    try:
        for job in jobs:
            begun.append(pool.submit(work, job))
            if len(begun) > ahead:
                yield result_of(begun.popleft())
        while begun:
            yield result_of(begun.popleft())
    finally:
        for future in begun:
            future.cancel()


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; a thread makes the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_next_of, items)
        while item := result_of(ahead):
            ahead = pool.submit(_next_of, items)
            yield item[0]


def _next_of(items: Iterator[T]) -> tuple[T] | None:
    for item in items:
        return (item,)
    return None


class _CancelledError(BaseException):
    """Ends a worker, past every `except Exception`."""


def _run_one(job: J, work: Callable[[J, Progress], T], progress: Progress) -> Outcome[J, T]:
    progress(0)
    try:
        return Outcome(job, work(job, progress), None)
    except LorashardError as err:
        return Outcome(job, None, err)
    except Exception as err:  # noqa: BLE001 - a bug in one job must not end the others
        if isinstance(err, OSError) and (described := describe(err)):
            refused = AdapterError(described[0], hint=described[1])
            refused.__cause__ = err
            return Outcome(job, None, refused)
        unexpected = LorashardError(f"{job}: unexpected {type(err).__name__}: {err}")
        unexpected.__cause__ = err  # where it happened, for LORASHARD_DEBUG=1
        return Outcome(job, None, unexpected)
