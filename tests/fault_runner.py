"""Runs lorashard commands that fail at their n-th system call, for tests/system/test_crash.py.

Reads one JSON job per line, {"argv", "action", "at", "calls"}, and answers with one JSON line,
{"code", "reached", "recorded", "stderr"}. Each job runs in a forked child, so the imports are paid
for once.

action: "kill" (SIGKILL), "term" (SIGTERM to itself, then the call is made), an errno's name (the call
raises OSError), or "record", which lets every call through. code: the exit code, or minus the
signal. recorded: [call, inode, path] of each call that made something durable or renamed it, in the
order in which they ended; the path is where it was renamed to.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorashard.cli import app
from lorashard.errors import LorashardError
from lorashard.storage import staging

TIMEOUT_S = 30


def fail_at(action: str, at: int, calls: list[str], reached: Callable[[], None]) -> None:
    """Make the `at`-th of all `calls` together, counted from 1, act.

    calls: names in os, or "exchange", which os lacks. "rename" is also the one that replaces nothing.
    """
    counter, lock = itertools.count(1), threading.Lock()

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with lock:
                number = next(counter)
            if number == at:
                reached()
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif action == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    code = getattr(errno, action)
                    raise OSError(code, os.strerror(code))
            return original(*args, **options)

        return call

    for name in calls:
        home = staging if name == "exchange" else os
        setattr(home, name, failing(getattr(home, name)))
        if name == "rename":
            staging.rename_to_free = failing(staging.rename_to_free)


def record_calls(log: Any) -> None:
    """Write a line to `log` for every fsync, rename and exchange that succeeds."""
    lock = threading.Lock()

    def write(call: str, inode: int, path: object = None) -> None:
        with lock:
            log.write(json.dumps([call, inode, path and str(path)]).encode() + b"\n")
            log.flush()

    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        fsync(fd)
        write("fsync", os.fstat(fd).st_ino)

    def recorded_rename(source: Any, target: Any) -> None:
        inode = Path(source).stat().st_ino
        rename(source, target)
        write("rename", inode, target)

    def recorded(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        def call(one: Any, other: Any) -> bool:
            inode = Path(one).stat().st_ino
            done = original(one, other)
            if done:
                write("rename", inode, other)
            return done

        return call

    os.fsync, os.rename = recorded_fsync, recorded_rename
    staging.exchange = recorded(staging.exchange)
    staging.rename_to_free = recorded(staging.rename_to_free)


def run_job(job: dict[str, Any], stderr: int, reached: Callable[[], None], log: Any) -> None:
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if job["action"] == "record":
        record_calls(log)
    elif job["action"]:
        fail_at(job["action"], job["at"], job["calls"], reached)
    sys.argv = ["lorashard", *job["argv"]]
    app.main()


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as stderr,
        tempfile.TemporaryFile() as reached,
        tempfile.TemporaryFile() as log,
    ):
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT_S)
            code = 70
            try:
                run_job(job, stderr.fileno(), lambda: reached.write(b"x") and reached.flush(), log)
            except SystemExit as err:
                code = err.code if isinstance(err.code, int) else 0
            except BaseException:  # noqa: BLE001 - the test sees it in stderr
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        log.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "reached": os.fstat(reached.fileno()).st_size > 0,
            "recorded": [json.loads(line) for line in log],
            "stderr": stderr.read().decode(),
        }


def warm_up() -> None:
    """Import, once for all jobs, what a command imports when it is first parsed and run."""
    with suppress(LorashardError):
        app.app(["split", "/nowhere", "--ep-size", "2"], standalone_mode=False)


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(supervise(json.loads(line))) + "\n")
        sys.stdout.flush()
