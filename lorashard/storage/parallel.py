"""Several things at once: a failure of one is written down, and the others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorashard.errors import LorashardError
from lorashard.progress import Progress

J = TypeVar("J")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[J, T]):
    """How one job ended: with a result, or an error."""

    job: J
    result: T | None
    error: LorashardError | None


def run_all(
    jobs: Sequence[J],
    work: Callable[[J, Progress], T],
    *,
    workers: int,
    finished: Callable[[Outcome[J, T]], None],
) -> tuple[Outcome[J, T], ...]:
    """Call `work` for each job in `workers` threads; how each ended, in the order of `jobs`.

    work: is given a Progress that it must call now and then: that is how it is ended when this
    thread is interrupted. finished: called in this thread as jobs end; what it raises ends all.
    """
    stop = threading.Event()

    def ended_on_request(_: int) -> None:
        if stop.is_set():
            raise _Interrupted

    with ThreadPoolExecutor(workers, thread_name_prefix="lorashard-batch") as pool:
        futures = [pool.submit(_run_one, job, work, ended_on_request) for job in jobs]
        try:
            for future in as_completed(futures):
                finished(future.result())
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)


class _Interrupted(BaseException):
    """Unwinds a worker, past every `except Exception`."""


def _run_one(job: J, work: Callable[[J, Progress], T], progress: Progress) -> Outcome[J, T]:
    progress(0)
    try:
        return Outcome(job, work(job, progress), None)
    except LorashardError as err:
        return Outcome(job, None, err)
    except Exception as err:  # noqa: BLE001 - a fault of ours in one must not lose the others
        told = LorashardError(f"{job}: unexpected {type(err).__name__}: {err}")
        return Outcome(job, None, told)
