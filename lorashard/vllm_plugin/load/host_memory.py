"""How many buffers the host's free memory allows for: wanted number and size -> number.

Free memory is what /proc/meminfo and the container's cgroup say, shared with the other workers.
"""

from __future__ import annotations

import os
from pathlib import Path

_SHARE = 8  # all workers of this host together take at most one eighth of what is free
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def affordable_buffers(wanted: int, size: int) -> int:
    """At most `wanted` buffers of `size` bytes each, and 0 or more; fewer if memory is short."""
    return max(0, min(wanted, available_bytes() // _SHARE // local_workers() // max(1, size)))


def available_bytes() -> int:
    """Bytes that are free on the host, or within this container's limit if that is less."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _number(path: Path) -> int | None:
    """The number in a cgroup v2 file; None without such a file or without a limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def local_workers() -> int:
    """The workers of this engine on this host; all of them, where nobody says how many those are."""
    import torch.distributed as dist

    said = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
    return max(1, said or (int(dist.get_world_size()) if dist.is_initialized() else 1))
