"""Writes to a file in memory whose pages are all there, as those of an outdated version are.

The kernel lets one thread at a time of all processes write to a file: 3.5 GB/s, however many ranks
write to it (32 cores of a GPU host). Where it is mapped they do not wait for each other.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

from lorashard.storage.syscalls import populate, release

_BLOCK_BYTES = 512  # of st_blocks, on any file system


def has_all_pages(fd: int, size_bytes: int) -> bool:
    """Whether a file in memory has this size and no holes, for which a page would have to be found."""
    status = os.fstat(fd)
    return status.st_size == size_bytes > 0 and status.st_blocks * _BLOCK_BYTES >= size_bytes


class MappedWriter:
    """Writes to any place of a file, for several threads, and processes, at the same time."""

    def __init__(self, fd: int) -> None:
        self._mapping = mmap.mmap(fd, 0)

    def write(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Write all of the pieces from `offset`. Raises OSError if a page was taken away."""
        import numpy as np  # noqa: PLC0415 - its copies let other threads of Python go on

        end = offset + sum(map(len, pieces))
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        populate(self._mapping, first, end)
        for piece in pieces:
            into = np.frombuffer(self._mapping, np.uint8, len(piece), offset)
            into[:] = np.frombuffer(piece, np.uint8)
            offset += len(piece)
        release(self._mapping, first, end)

    def close(self) -> None:
        """What was written stays."""
        with suppress(BufferError):  # an error on the way here still refers to it
            self._mapping.close()
