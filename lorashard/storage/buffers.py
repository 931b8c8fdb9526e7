"""Large buffers for threads that hand data to each other, each used again and again.

In: how many and how large. Out: memory that is zero at first, as `mmap` objects; a `memoryview` of
one is what `ByteSource.read_into` fills.
"""

from __future__ import annotations

import mmap
import queue
import threading
from contextlib import suppress


class BufferPool:
    """`count` buffers of `size` bytes or more; `take` waits until one is free."""

    def __init__(self, count: int, size: int) -> None:
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(allocate_private(size))

    def take(self, size: int) -> mmap.mmap:
        """A buffer of at least `size` bytes; a free one that is too small is replaced."""
        buffer = self._free.get()
        return buffer if len(buffer) >= size else allocate_private(size)

    def give(self, buffer: mmap.mmap) -> None:
        """Hand a buffer back."""
        self._free.put(buffer)


class Buffer:
    """A buffer that is kept for its next use."""

    def __init__(self) -> None:
        self._held: mmap.mmap | None = None

    def get(self, size: int) -> memoryview:
        """`size` bytes, with whatever the last use left in them; a smaller buffer is replaced."""
        if self._held is None or len(self._held) < size:
            self._held = allocate_private(size)
        return memoryview(self._held)[:size]


class ThreadBuffer(Buffer, threading.local):
    """A buffer for each thread that asks for it, kept for its next use there."""


def allocate_private(size: int) -> mmap.mmap:
    """Memory of this process alone, on huge pages where the kernel has them on request.

    The first touch of 16 MiB then takes 1 ms instead of 5; later ones take the same time.
    """
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def allocate_shared(size: int) -> mmap.mmap:
    """Memory that a forked child shares with its parent, for pages that a device reads.

    A fork makes private pages copy-on-write, so the parent's next write can move them away from
    where the device reads. Shared pages stay in place. The kernel gives them huge pages only if
    /sys/kernel/mm/transparent_hugepage/shmem_enabled allows it, which by default it does not.
    """
    buffer = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
