"""The machine that the numbers come from: without it, a figure is worth little."""

import os
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path

from tests.bench.measure import drop_from_page_cache

_REPOSITORY = Path(__file__).parents[2]
_DISK_BYTES = 512 * 2**20


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


def describe_disk(work: Path) -> dict[str, str]:
    """How fast plain reads and synced writes are in `work`; an adapter is not copied faster."""
    chunk = random.Random(0).randbytes(2**20)
    with tempfile.NamedTemporaryFile(dir=work) as file:
        start = time.perf_counter()
        for _ in range(_DISK_BYTES // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        drop_from_page_cache([Path(file.name)])
        start = time.perf_counter()
        with Path(file.name).open("rb", buffering=0) as again:
            while again.readinto(memoryview(bytearray(len(chunk)))):
                pass
        read = time.perf_counter() - start
    speeds = (f"{_DISK_BYTES / 1e9 / seconds:.2f} GB/s" for seconds in (written, read))
    return {"file system": _file_system(work)} | dict(zip(("write and sync", "read"), speeds))


def is_in_memory(path: Path) -> bool:
    """Whether `path` is in a file system without a disk, such as /dev/shm."""
    return _file_system(path) in {"tmpfs", "ramfs"}


def _file_system(path: Path) -> str:
    command = ("stat", "--file-system", "--format=%T", str(path))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
