"""How much host memory may be prepared at start."""

from __future__ import annotations

import os
from pathlib import Path

_SHARE = 8  # of what is free, all workers of this host together take at most one part in so many
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def affordable_buffers(wanted: int, size: int) -> int:
    """At most `wanted` buffers of `size` bytes, as far as the host's free memory allows."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0) or _local_workers()
    return max(0, min(wanted, available_bytes() // _SHARE // max(1, workers) // max(1, size)))


def available_bytes() -> int:
    """Free memory of the host, or of this container's limit if that is less."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _number(path: Path) -> int | None:
    """A cgroup v2 file's number; None where there is none or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _local_workers() -> int:
    """The ranks of this engine, as if all were on this host."""
    import torch.distributed as dist

    return int(dist.get_world_size()) if dist.is_initialized() else 1
