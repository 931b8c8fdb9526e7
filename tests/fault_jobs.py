"""The jobs of tests/fault_runner.py that are no command: ranks that commit, and a publisher."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from lorashard import Publisher
from lorashard.errors import LorashardError
from lorashard.publish import exchange
from tests.publish.test_writer import dealt

RANKS = ([0, 1, 2], [3, 4, 5])
WAITS_S = 20
exchange._SEEN_WITHIN_S = 1.0  # where a rank cannot write that it failed


def commit(
    adapter: str, out: str, failing: int, install: Callable[[], None], *, force: bool = False
) -> None:
    """Two ranks write `out`; the fault is one of rank `failing`. As a launcher, it ends all with one.

    Exits with a rank's code: 5 for an error of ours.
    """
    barrier = mp.get_context("fork").Barrier(len(RANKS))
    children = {}
    for rank in range(len(RANKS)):
        child = os.fork()
        if child == 0:
            os._exit(
                _commit_one(
                    adapter, out, rank, barrier, install if rank == failing else None, force
                )
            )
        children[child] = rank
    codes = [0] * len(RANKS)
    while children:
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)  # for who started this, to run something meanwhile
            os.kill(child, signal.SIGCONT)
            continue
        codes[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
        if code < 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
    sys.exit(next((5 if code > 0 else 128 - code for code in codes if code), 0))


def _commit_one(adapter: str, out: str, rank: int, barrier, install, force: bool) -> int:
    writer = dealt(Path(adapter), Path(out), *RANKS, force=force)[rank]
    if install is not None:
        install()
    try:
        writer.commit(lambda: barrier.wait(WAITS_S))
    except LorashardError as err:
        sys.stderr.write(f"rank {rank}: {type(err).__name__}: {err}\n")
        return 5
    return 0


def publish(directory: str, version: int, servers: list[str]) -> None:
    """Exits with 5 for an error of ours."""
    publisher = Publisher(directory, "policy", servers=servers, keep=1, timeout_s=20)
    try:
        done = publisher.publish(version)
    except (LorashardError, OSError) as err:  # docs/errors.md: in Python both
        sys.stderr.write(f"{type(err).__name__}: {err}\n")
        sys.exit(5)
    sys.stderr.write("".join(f"left: {line}\n" for line in done.removal.left))
    sys.exit(0)
