"""A local directory held open: its files stay those of one version, whatever its path becomes.

A directory that is replaced by a rename keeps its content for who has it open. Files opened by path,
one after the other, could be of the old directory and of the new one.
"""

from __future__ import annotations

import os
from pathlib import Path

from lorashard.storage.local import LocalFile
from lorashard.storage.small_files import MAX_SMALL_FILE_BYTES, read_bounded


class HeldDirectory:
    """The directory that was at `path` when it was opened. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def file(self, name: str) -> LocalFile:
        """A file in it, to be closed by the caller. Raises HeaderError if it cannot be opened."""
        return LocalFile(self.path / name, dir_fd=self._fd)

    def read(self, name: str, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
        """A file whole. Raises OSError, or AdapterError if it is larger than that."""
        return read_bounded(self.path / name, max_bytes, dir_fd=self._fd)

    def was_replaced(self) -> bool:
        """Whether its path is now another directory, or none."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except OSError:
            return True

    def close(self) -> None:
        """Close the directory, not the files that were opened."""
        os.close(self._fd)
