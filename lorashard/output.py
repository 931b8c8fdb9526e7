"""A directory that appears whole or not at all.

Everything is written into a staging directory beside the target, synced, and renamed. Whatever
kills the process, the target is absent, the old one, or the finished new one; the staging
directory says by its name what it is, and the next run of the same target clears it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorashard.errors import OutputExistsError, ShardError
from lorashard.writeback import exchange

_IGNORED_IN_MOUNTS = frozenset({"lost+found"})

Replaceable = Callable[[Path], bool]


@contextmanager
def staged_directory(
    target: Path, *, last: str, force: bool, replaceable: Replaceable
) -> Iterator[Path]:
    """Yield an empty directory whose content becomes `target` when the block ends well.

    last: the file that marks the content complete; it is moved last where files must be moved
    one by one. force: replace a `target` for which `replaceable` holds, atomically.
    Raises OutputExistsError if the target is in the way, ShardError if the disk is full.
    """
    check_target(target, force=force, replaceable=replaceable)
    inside = os.path.ismount(target)  # a mount point cannot be renamed over
    staging = (
        target / ".lorashard-partial"
        if inside
        else target.parent / f".{target.name}.lorashard-partial"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(staging, target)
        try:
            yield staging
            _sync_directory(staging)
            if inside:
                _move_files(staging, target, last)
            else:
                _rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                f"{target.parent}: no space left while writing {target.name}.",
                hint="Nothing was left behind. `lorashard plan` says how much is needed.",
            ) from err
        if err.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ShardError(
                f"{target}: cannot be written ({os.strerror(err.errno)}).",
                hint="Choose another place with -o.",
            ) from err
        raise


def check_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Raise OutputExistsError unless `target` is free, or may be replaced."""
    if not os.path.lexists(target) or _is_empty(target):
        return
    if not replaceable(target):
        raise OutputExistsError(
            target,
            reason="exists and is not what lorashard would write there",
            hint="It is left alone, also with --force. Choose another place with -o.",
        )
    if not force:
        raise OutputExistsError(
            target,
            reason="exists",
            hint="--force replaces it, atomically; or choose another place with -o.",
        )


def _is_empty(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    mount = os.path.ismount(path)
    return not any(
        not (mount and name in _IGNORED_IN_MOUNTS) and name != ".lorashard-partial"
        for name in os.listdir(path)
    )


def _claim(staging: Path, target: Path) -> int:
    """Create `staging` empty and lock it; a leftover of a killed run is cleared."""
    with suppress(FileExistsError):
        staging.mkdir()
    lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        raise OutputExistsError(
            target,
            reason="another lorashard is writing it",
            hint=f"Wait for it, or end it; its work is in {staging}.",
        ) from err
    for child in staging.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    return lock


def _rename(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; an old one is swapped out in the same instant."""
    if not os.path.lexists(target) or _is_empty(target):
        os.rename(staging, target)
    elif not exchange(staging, target):
        aside = target.with_name(f".{target.name}.lorashard-old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(staging, target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(target.parent)


def _move_files(staging: Path, target: Path, last: str) -> None:
    names = sorted(child.name for child in staging.iterdir() if child.name != last)
    for name in (*names, last):
        if name == last:
            _sync_directory(target)
        os.rename(staging / name, target / name)
    _sync_directory(target)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
