"""Runs lorashard while one call on a file fails, for the tests of faults in tests/system.

Reads one JSON job per line and answers with one JSON line. Each job runs in a forked child, so the
imports are paid for once. Run with the argument "torch" for jobs of writers.

A job: "argv" of a command, "commit" or "publish" (see fault_jobs.py); "folder", which is the current
one, and below which calls count; "action", and "at", the number of the call, counted from 1 among those
whose name is in "calls" (see file_calls.py). "other": "argv" of another command, for "stop".

action: "kill" (SIGKILL), "term" (SIGTERM to itself, then the call is made), an errno's name (the call
raises OSError), such a name with "+" (so does each that comes after it), "short" (each call reads or
writes half of what it was asked to), "signals" (calls are interrupted again and again), "stop" (the
other command runs meanwhile), "record", which lets every call through, or "".

An answer: "code", the exit code or minus the signal; "reached", whether it came to that call; "recorded",
for "record": what file_calls.py says of each that changed something, in the order in which they ended;
"counted", how many calls of each name there were; "stderr"; "other", an answer.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from contextlib import suppress
from typing import Any

from lorashard.cli import app
from lorashard.errors import LorashardError
from tests import file_calls

TIMEOUT_S = 30
INTERRUPTED_EVERY_S = 0.0005


class Fault:
    """What a job does to the calls. counted: a file that gets the name of each."""

    def __init__(self, job: dict[str, Any], counted: Any, reached: Any, log: Any) -> None:
        self._action, self._at, self._calls = job["action"], job["at"], set(job["calls"])
        self._counted, self._reached, self._log = counted, reached, log
        self._folder = job["folder"]
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def install(self) -> None:
        if self._action == "signals":
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, INTERRUPTED_EVERY_S, INTERRUPTED_EVERY_S)
        elif self._action == "record":
            file_calls.follow(self._folder, lambda _: None, self._write)
        elif self._action:
            file_calls.follow(self._folder, self._decide)

    def _write(self, *call: Any) -> None:
        _append(self._log, json.dumps(call).encode() + b"\n")

    def _decide(self, call: str) -> str | None:
        if call not in self._calls:
            return None
        with self._lock:
            number = next(self._numbers)
            _append(self._counted, call.encode() + b" ")
        if self._action == "short":
            return "short"
        lasts = self._action.endswith("+")
        if number < self._at or (number > self._at and not lasts):
            return None
        _append(self._reached, b"x")
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._action != "count":
            code = getattr(errno, self._action.rstrip("+"))
            raise OSError(code, os.strerror(code))
        return None


_append_all = os.write  # before it is replaced


def _append(file: Any, data: bytes) -> None:
    _append_all(file.fileno(), data)


def run_job(job: dict[str, Any], stderr: int, fault: Fault) -> None:
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(job["folder"])
    if "argv" in job:
        fault.install()
        sys.argv = ["lorashard", *job["argv"]]
        app.main()
        return
    from tests import fault_jobs

    if "commit" in job:
        fault_jobs.commit(**job["commit"], install=fault.install)
    else:
        fault.install()
        fault_jobs.publish(**job["publish"])


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as reached,
        tempfile.TemporaryFile() as counted,
        tempfile.TemporaryFile() as log,
    ):
        child = os.fork()
        if child == 0:
            signal.alarm(0 if job["action"] == "signals" else TIMEOUT_S)
            code = 70
            try:
                run_job(job, stderr.fileno(), Fault(job, counted, reached, log))
            except SystemExit as err:
                code = err.code if isinstance(err.code, int) else 0
            except BaseException:  # noqa: BLE001 - the test sees it in stderr
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, os.WUNTRACED)
        other = None
        if os.WIFSTOPPED(status):
            other = supervise({**job, **job["other"], "action": ""})
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        for file in (stderr, counted, log):
            file.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "reached": os.fstat(reached.fileno()).st_size > 0,
            "counted": Counter(counted.read().decode().split()),
            "recorded": [json.loads(line) for line in log],
            "stderr": stderr.read().decode(),
            "other": other,
        }


def warm_up(*, with_torch: bool) -> None:
    """Import, once for all jobs, what a command imports when it is first parsed and run."""
    with suppress(LorashardError):
        app.app(["split", "/nowhere", "--ep-size", "2"], standalone_mode=False)
    if with_torch:
        from tests import fault_jobs  # noqa: F401


if __name__ == "__main__":
    warm_up(with_torch="torch" in sys.argv)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(supervise(json.loads(line))) + "\n")
        sys.stdout.flush()
