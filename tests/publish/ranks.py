"""The ranks of a training, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.tiny import REPO


def run_ranks(
    script: Path,
    world: int,
    folder: Path,
    *more: str,
    packages: Path | None = None,
    timeout_s: float = 180.0,
) -> None:
    """Run `python SCRIPT RANK WORLD FOLDER MORE...` for each rank, to the end of all of them.

    packages: a directory that the ranks import from as well. If a rank fails, or the time is over, the
    others are ended, and the logs of all, with the stacks of those, are in the assertion's message.
    """
    path = f"{REPO}:{packages}" if packages else str(REPO)
    logs = [folder / f"{rank}.log" for rank in range(world)]
    with ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(script), str(rank), str(world), str(folder), *more],
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stderr=stack.enter_context(log.open("wb")),
                stdout=subprocess.DEVNULL,
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        codes = {process.poll() for process in ranks}
        if None not in codes or codes - {None, 0}:
            break
        time.sleep(0.05)
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler then writes its stacks
    ended = [process.wait() for process in ranks]
    assert ended == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
