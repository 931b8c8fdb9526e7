"""The plugin's environment variables, each named once. They are read when needed, not at import.

LORASHARD_DISABLE=1         the plugin does nothing
LORASHARD_STRICT=1          a shard directory for another placement is an error, not a warning
LORASHARD_VERIFY=full       every byte loaded is checked against its recorded digest
LORASHARD_WARM_BUFFERS=N    host buffers prepared at start (3; 0 = none)
LORASHARD_THREADS=N         threads that read one adapter (16, or each worker's processors if less)
LORASHARD_EXPERT_MAPS=DIR   with --enable-eplb: where each rearrangement leaves its expert map
LORASHARD_RISK_...=1        serve despite a refusal, see engine/guards.py
"""

from __future__ import annotations

import os

from lorashard.storage.syscalls import available_cpus

DISABLE = "LORASHARD_DISABLE"
STRICT = "LORASHARD_STRICT"
VERIFY = "LORASHARD_VERIFY"
WARM_BUFFERS = "LORASHARD_WARM_BUFFERS"
THREADS = "LORASHARD_THREADS"
EXPERT_MAPS = "LORASHARD_EXPERT_MAPS"
VARIABLES = (DISABLE, STRICT, VERIFY, WARM_BUFFERS, THREADS, EXPERT_MAPS)

_OFF = ("", "0", "false", "off", "no")


def is_set(variable: str) -> bool:
    """Whether a switch is on: set to anything but an empty text, 0, false, off or no."""
    return os.environ.get(variable, "").strip().lower() not in _OFF


def verifies_fully() -> bool:
    """Whether digests are checked at every load. Raises ValueError for an unknown value."""
    value = os.environ.get(VERIFY, "").strip().lower()
    if value not in ("", "header", "full"):
        raise ValueError(f"{VERIFY}={value!r}: must be 'header' (the default) or 'full'.")
    return value == "full"


def warm_buffers() -> int:
    """How many host buffers to prepare at start."""
    return _count(WARM_BUFFERS, 3, least=0)


def reader_threads(num_workers: int = 1) -> int:
    """How many threads read one adapter. num_workers: on this host, which read at the same time.

    For 0.56 GB each of two workers takes 57 ms with 4, 36 with 8, 25 with 16, and 25 with 24 (two H100,
    32 processors).
    """
    num_processors = available_cpus() // max(1, num_workers)
    return _count(THREADS, min(16, max(1, num_processors)), least=1)


def expert_map_directory() -> str | None:
    """Where the maps of an engine whose experts move are written; None = nowhere."""
    return os.environ.get(EXPERT_MAPS, "").strip() or None


def _count(variable: str, default: int, *, least: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{variable}={text!r}: must be an integer >= {least}.")
    return int(text)
