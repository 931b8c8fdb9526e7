"""Whether a disk has room for what is about to be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lorashard.errors import NoRoomError

_HINT = "Free some space, or choose another place with `out`."


def check_disk_space(target: Path, size_bytes: int, *, hint: str | None = None) -> None:
    """Raise NoRoomError if `size_bytes` do not fit where `target` is going to be. hint: what to do then.

    A file system that does not say how large it is, as some network ones, is believed to have room.
    """
    folder = target.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return
    if usage.total > 0 and usage.free < size_bytes:
        raise NoRoomError(
            f"{os.fspath(target)}: {_gigabytes(size_bytes)} are to be written, and {folder} has "
            f"{_gigabytes(usage.free)} free.",
            hint=hint or _HINT,
        )


def _gigabytes(size_bytes: int) -> str:
    if size_bytes < 1e8:
        return f"{size_bytes / 1e6:.2f} MB"
    return f"{size_bytes / 1e9:.2f} GB"
