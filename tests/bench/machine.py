"""The machine that the numbers come from: without it, a figure is worth little."""

import os
import platform
import subprocess
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    command = ("git", "-C", str(_REPOSITORY), *arguments)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short", "--verify", "--quiet", "HEAD")
    if not commit:
        return "not committed"
    return f"{commit} + changes" if _git("status", "--porcelain") else commit


def describe_machine() -> dict[str, str]:
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "ram": f"{ram_bytes / 1e9:.0f} GB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "lorashard": _commit(),
    }
