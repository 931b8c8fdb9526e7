"""Three system calls of Linux that Python does not have, each a hint that may be missing."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h

_libc = ctypes.CDLL(None, use_errno=True)


def reserve(fd: int, size_bytes: int) -> None:
    """Give a file its size and, where the file system can, its blocks.

    So a full disk is found before a byte is written, and scattered writes are nearly as fast as
    one long one (ext4: 6 GB in 256 KiB pieces 1.9 s instead of 3.3 s). fallocate(2) is called
    itself because posix_fallocate writes every block where the file system cannot reserve.
    """
    os.truncate(fd, size_bytes)
    if not hasattr(_libc, "fallocate") or size_bytes == 0:
        return
    zero = ctypes.c_longlong(0)
    if _libc.fallocate(fd, 0, zero, ctypes.c_longlong(size_bytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk begin on bytes that are final, so that fsync finds little left to wait for."""
    if hasattr(_libc, "sync_file_range"):  # Linux; a hint, so its result does not matter
        begin, size = ctypes.c_longlong(offset), ctypes.c_longlong(length)
        _libc.sync_file_range(fd, begin, size, _SYNC_FILE_RANGE_WRITE)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    if not hasattr(_libc, "renameat2"):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return int(_libc.renameat2(*arguments)) == 0
