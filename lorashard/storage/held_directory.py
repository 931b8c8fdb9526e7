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

    def has_kept(self, file: LocalFile) -> bool:
        """Whether a file that was opened here still is what it was when it was opened.

        It is not if it was written to, if another one has its name, or if it has gone to another
        place, to be written to there (as `storage.spares` has it). One that was deleted has no place
        any more, and stays as it is.
        """
        opened = os.fstat(file.fileno())
        try:
            has_stayed = os.path.samestat(os.stat(Path(file.name).name, dir_fd=self._fd), opened)
        except FileNotFoundError:
            has_stayed = opened.st_nlink == 0
        except OSError:
            has_stayed = False
        return has_stayed and not file.was_written_to()

    def close(self) -> None:
        """Close the directory, not the files that were opened."""
        os.close(self._fd)
