"""Local files: a `ByteSource` to read one from, and writes that reach the disk.

In: paths and open file descriptors. Out: bytes in buffers of the caller's; files and directories
that are synced. `remote` has the `ByteSource` for files elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Protocol

from lorashard.errors import AdapterError, HeaderError
from lorashard.rules import REPLACED_WHILE_READ
from lorashard.storage.syscalls import start_writeback

_AHEAD_BYTES = 16 * 2**20
_WRITEBACK_BYTES = 2**20
_MOST_PIECES = 1024  # for one call: IOV_MAX of Linux and macOS
# For a longer write the kernel takes page cache in larger parts (ext4), which a virtual machine has
# most likely given back to its host: 0.4 to 0.7 GB/s of new pages, and 2.5 in these steps.
_WRITE_BYTES = 256 * 2**10


class ByteSource(Protocol):
    """Random access to a known number of bytes."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; raise HeaderError if the source ends before."""


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from byte `offset` and return how many bytes there were. Thread-safe."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


@dataclass(frozen=True, slots=True)
class WatchedFile:
    """A local file in the state in which it was first seen.

    state: device, inode, size in bytes and time of the last change in ns, as stat(2) has them.
    """

    path: Path
    state: tuple[int, int, int, int]

    def check_unchanged(self) -> None:
        """Raise AdapterError if the path names another file by now, or this one was written to."""
        try:
            unchanged = _state(self.path.stat()) == self.state
        except OSError:
            unchanged = False
        if not unchanged:
            raise AdapterError(
                f"{self.path}: it changed while being read.",
                hint="Run the command again when nobody is writing there.",
                rule=REPLACED_WHILE_READ,
            )


def watch_file(path: Path) -> WatchedFile:
    """Take down the state of a file that will be read. Raises AdapterError if there is none."""
    try:
        return WatchedFile(path, _state(path.stat()))
    except OSError as err:
        raise AdapterError(
            f"{path}: {os.strerror(err.errno or 0)}.", hint="Check the path."
        ) from err


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_regular(path: Path, dir_fd: int | None = None) -> int:
    """Open a file to read. Raises OSError for what is no file, and never waits for a pipe.

    dir_fd: an open directory, in which the file of that name is then opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(path, flags) if dir_fd is None else os.open(path.name, flags, dir_fd=dir_fd)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))


class LocalFile:
    """A ByteSource over an open file descriptor."""

    def __init__(self, path: Path, dir_fd: int | None = None) -> None:
        """Open the file, as `open_regular` does. Raises HeaderError if that fails."""
        self._path = path
        try:
            self._fd = open_regular(path, dir_fd)
        except OSError as err:
            raise HeaderError(path, f"cannot be read ({err.strerror})", rule=None) from err
        status = os.fstat(self._fd)
        self.size_bytes = status.st_size
        self._watched = WatchedFile(path, _state(status))
        self._expected = 0  # where the next read begins if the file is read front to back
        self._requested = 0  # up to where the kernel was asked to read ahead

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; raise HeaderError if the file ends before."""
        self._expect(offset, len(buffer))
        self._fill(buffer, offset)

    def read_pieces(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Fill one buffer after the other from byte `offset`, in as few calls as possible."""
        for group in _groups(pieces):
            size = sum(map(len, group))
            self._expect(offset, size)
            if len(group) == 1 or self._read_group(group, offset) < size:
                position = offset
                for piece in group:
                    self._fill(piece, position)
                    position += len(piece)
            offset += size

    @property
    def name(self) -> str:
        """Its path, for messages."""
        return str(self._path)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end), without reading ahead. Raises HeaderError if the file ends before."""
        buffer = bytearray(end - begin)
        self._fill(memoryview(buffer), begin)
        return bytes(buffer)

    def fileno(self) -> int:
        """The open file descriptor."""
        return self._fd

    def check_unchanged(self) -> None:
        """Raise AdapterError if its path names another file by now, or it was written to."""
        self._watched.check_unchanged()

    def was_written_to(self) -> bool:
        """Whether this file was since it was opened, whatever its path names by now."""
        return _state(os.fstat(self._fd)) != self._watched.state

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _expect(self, offset: int, length: int) -> None:
        if offset == self._expected:
            self._read_ahead(offset + length)
        else:
            self._requested = 0
        self._expected = offset + length

    def _read_group(self, group: Sequence[memoryview], offset: int) -> int:
        try:
            return os.preadv(self._fd, group, offset)
        except OSError as err:
            raise HeaderError(self._path, f"cannot be read ({err.strerror})", rule=None) from err

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            done = read_at(self._fd, buffer, offset)
        except OSError as err:
            raise HeaderError(self._path, f"cannot be read ({err.strerror})", rule=None) from err
        if done < len(buffer):
            raise HeaderError(
                self._path,
                f"it ended at byte {offset + done} while being read",
                rule=REPLACED_WHILE_READ,
            )

    def _read_ahead(self, position: int) -> None:
        """Let the disk read what comes next while the processor works on this."""
        if hasattr(os, "posix_fadvise") and position > self._requested - _AHEAD_BYTES // 2:
            begin = max(self._requested, position)
            os.posix_fadvise(self._fd, begin, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            self._requested = begin + _AHEAD_BYTES


@contextmanager
def opened_to_write(path: Path, *, shared: bool = False) -> Iterator[int]:
    """A new file to write. shared: or the one that another process has made, which does so as well."""
    exclusive = 0 if shared else os.O_EXCL
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | exclusive
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a full disk raises OSError(ENOSPC)."""
    while data:
        count = os.pwrite(fd, data[:_WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


def write_pieces(fd: int, pieces: Sequence[memoryview], offset: int) -> None:
    """Write one buffer after the other from `offset`, in few calls."""
    for group in _groups(pieces, _WRITE_BYTES):
        size = sum(map(len, group))
        if len(group) == 1:
            write_all(fd, group[0], offset)
        elif (done := os.pwritev(fd, group, offset)) < size:
            write_all(fd, memoryview(b"".join(group))[done:], offset + done)
        offset += size


def _groups(pieces: Sequence[memoryview], most_bytes: float = inf) -> Iterator[list[memoryview]]:
    """As many pieces as one call takes; a single one may have more bytes."""
    group: list[memoryview] = []
    size = 0
    for piece in pieces:
        if group and (len(group) == _MOST_PIECES or size + len(piece) > most_bytes):
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece)
    if group:
        yield group


class Writer(Protocol):
    """Writes to any place of a file, for several threads."""

    def write(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Write all of the pieces from `offset`. Raises OSError."""


class SharedWriter:
    """Writes to any place of a file, for several threads.

    The kernel lets one thread at a time write to a file, and the others spin (6 % of the processor
    in `split`). Here they sleep, and a thread that reads or digests has the core.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def write(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Write all of the pieces from `offset`; a full disk raises OSError(ENOSPC)."""
        with self._lock:
            write_pieces(self._fd, pieces, offset)


class SequentialWriter:
    """Writes a file front to back; the disk begins with what is written while more comes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size_bytes = 0
        self._started = 0  # up to where the kernel was asked to write to disk

    def write(self, data: memoryview) -> None:
        """Write all of `data` behind what is there; a full disk raises OSError(ENOSPC)."""
        write_all(self._fd, data, self.size_bytes)
        self.size_bytes += len(data)
        if (length := self.size_bytes - self._started) >= _WRITEBACK_BYTES:
            start_writeback(self._fd, self._started, length)
            self._started = self.size_bytes


def sync_all(fds: Sequence[int]) -> None:
    """Fsync several files at once, since most of the time is spent waiting for the disk."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(os.fsync, fds))


def write_new(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a small file that is not there yet. sync: wait until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Sync a directory itself: which names are in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
