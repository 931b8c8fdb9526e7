"""Measure commands, and control which files are in the page cache while they run."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("launch.py")
_READ_BYTES = 1 << 20
_MOST_TIMES = 8  # as much memory as a command needs


class CommandFailedError(Exception):
    """A measured command exited with an error, so its time means nothing."""

    def __init__(self, command: Sequence[str], exit_code: int, stderr: str) -> None:
        super().__init__(f"exit {exit_code}: {' '.join(command)}\n{stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a command took."""

    seconds: float  # wall clock
    cpu_seconds: float  # user + system
    peak_rss_bytes: int  # of the biggest process in the tree


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run `command` with stdout closed off and measure it. environment: None for this process's.

    Raises CommandFailedError, with what the command wrote to stderr.
    """
    launched = subprocess.run(
        [sys.executable, "-I", "-S", str(_LAUNCHER), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if launched.returncode:
        raise CommandFailedError(command, launched.returncode, launched.stderr)
    report = json.loads(launched.stdout)
    if report["exit_code"]:
        raise CommandFailedError(command, report["exit_code"], launched.stderr)
    return Run(report["seconds"], report["cpu_seconds"], report["peak_rss_bytes"])


def total_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def touch_memory(size_bytes: int) -> None:
    """Use memory and free it, so that the next command finds pages that this machine has.

    A virtual machine gives free pages back to its host within seconds, and the first touch of a
    page then takes up to ten times as long as copying it: a toss-up which command meets them. The
    kernel takes any free page, so all of them are used, if that is not much more than the command
    needs: `cp` of 1.4 GB then took 0.42 to 0.46 s of processor time in three runs of four, and
    0.42 to 1.28 s after as much memory as it needs.
    """
    data = bytes(_READ_BYTES)
    size_bytes = max(size_bytes, min(_free_bytes(), _MOST_TIMES * size_bytes))
    with mmap.mmap(-1, max(size_bytes, len(data)), flags=mmap.MAP_PRIVATE) as pages:
        while pages.tell() + len(data) <= len(pages):
            pages.write(data)


def _free_bytes() -> int:
    """Free memory, less what others may take meanwhile."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Make the next read of these files come from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            # The kernel drops clean pages only.
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm_page_cache(paths: Iterable[Path]) -> None:
    """Make the next read of these files come from memory, if they fit."""
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
