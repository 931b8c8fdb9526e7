"""A directory that appears whole or not at all.

Everything is written into a staging directory beside the target, synced, and renamed. Whatever
kills the process, the target is absent, the old one, or the finished new one; the staging
directory says by its name what it is, and the next run of the same target clears it.

A mount point cannot be renamed over. There the staging directory stands inside, files are moved
one by one with the one that marks completion last, and a leftover staging directory marks what an
interrupted move left.
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
from lorashard.storage.syscalls import exchange

_STAGING_INSIDE = ".lorashard-partial"
_MOVING = ".moving"  # stands in it while files are moved, and lists them
WORK_INSIDE = ".lorashard-pull"  # pull.py's, where it keeps what an interrupted one has fetched
_IGNORED_IN_MOUNTS = frozenset({"lost+found", _STAGING_INSIDE, WORK_INSIDE})

# Says of a directory, given the names in it, whether it may be replaced.
Replaceable = Callable[[Path, frozenset[str]], bool]


@contextmanager
def staged_directory(
    target: Path, *, last: str, force: bool, replaceable: Replaceable
) -> Iterator[Path]:
    """Yield an empty directory whose content becomes `target` when the block ends well.

    last: the file that marks the content complete. force: replace a `target` for which
    `replaceable` holds, atomically.
    Raises OutputExistsError if the target is in the way, ShardError if it cannot be written.
    """
    target = _settled(target)
    check_target(target, force=force, replaceable=replaceable)
    inside = os.path.ismount(target)
    beside = target.parent / f".{target.name}.lorashard-partial"
    staging = target / _STAGING_INSIDE if inside else beside
    try:
        with _parents(target):
            lock = _claim(staging, target)
            try:
                yield staging
                _sync_directory(staging)
                if inside:
                    _move_files(staging, target, last)
                else:
                    _rename(staging, target)
            finally:
                _remove_own(staging, lock)
                os.close(lock)
    except OSError as err:
        raise _cannot_write(target, err) from err


def check_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Raise OutputExistsError unless `target` is free, or may be replaced."""
    target = _settled(target)
    try:
        if not os.path.lexists(target):
            return
        names = _names(target) if target.is_dir() else None
    except OSError as err:
        raise _cannot_write(target, err) from err
    if names == frozenset() or (names and _is_unfinished_move(target, names)):
        return
    if names is None or not replaceable(target, names):
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


def _settled(target: Path) -> Path:
    """An absolute path; of a link to a directory, the directory, so that the link stays one."""
    return target.resolve() if os.path.islink(target) else Path(os.path.abspath(target))  # noqa: PTH114 - quiet on odd names


def _names(path: Path) -> frozenset[str]:
    """What is in a directory, without what a mount point has of its own."""
    names = frozenset(os.listdir(path))
    return names - _IGNORED_IN_MOUNTS if os.path.ismount(path) else names


def _is_unfinished_move(target: Path, names: frozenset[str]) -> bool:
    """Whether a run was killed while it moved files into this mount point, and nothing else is."""
    marker = target / _STAGING_INSIDE / _MOVING
    try:
        return os.path.ismount(target) and names <= set(marker.read_text().splitlines())
    except OSError:
        return False


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders above `target`; take them away again if the block fails."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _claim(staging: Path, target: Path) -> int:
    """Create `staging` empty and lock it; a leftover of a killed run is cleared."""
    while True:
        with suppress(FileExistsError):
            staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        _lock(lock, target, staging)
        if _is_same(staging, lock):
            break
        os.close(lock)  # its last owner renamed or removed it in between
    if staging.parent == target and _is_unfinished_move(target, _names(target)):
        for name in _names(target):
            (target / name).unlink()
    _clear(staging)
    if os.path.lexists(target):
        _remove(_aside(target))
    elif _aside(target).exists():  # killed between two renames: the old one is still the one
        os.rename(_aside(target), target)
    return lock


def _lock(fd: int, target: Path, work: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise OutputExistsError(
            target,
            reason="another lorashard is writing it",
            hint=f"Wait for it, or end it; its work is in {work}.",
        ) from err


def _is_same(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _rename(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; an old one is swapped out in the same instant."""
    if target.is_dir():
        staging.chmod(target.stat().st_mode & 0o7777)
    if not os.path.lexists(target) or not os.listdir(target):
        os.rename(staging, target)
    else:
        _replace(staging, target)
    _sync_directory(target.parent)


def _replace(staging: Path, target: Path) -> None:
    aside = _aside(target)
    old = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _lock(old, target, target)  # nobody may take the old content for a staging directory
    try:
        if exchange(staging, target):
            # The new one is in place: whatever comes now is no failure, but the old one must go.
            try:
                with suppress(OSError):
                    os.rename(staging, aside)
            finally:
                _remove_own(staging, old)
        else:
            os.rename(target, aside)
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(aside, target)
                raise
        _remove(aside)
    finally:
        os.close(old)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.lorashard-old")


def _move_files(staging: Path, target: Path, last: str) -> None:
    """Replace the content of a mount point. Without `last` it is not taken for finished."""
    old = _names(target)
    new = sorted(child.name for child in staging.iterdir() if child.name != last)
    (staging / _MOVING).write_text("\n".join(sorted({*old, *new} - {last})))
    _sync_directory(staging)
    (target / last).unlink(missing_ok=True)
    _sync_directory(target)
    moved: list[Path] = []
    try:
        for name in old - {last}:
            (target / name).unlink()
        for name in (*new, last):
            if name == last:
                _sync_directory(target)
            moved.append(target / name)
            os.rename(staging / name, target / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    _sync_directory(target)


def _remove_own(staging: Path, lock: int) -> None:
    if _is_same(staging, lock):
        _remove(staging)


def _remove(path: Path) -> None:
    """Remove a directory, also if a signal comes while that is under way."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _clear(directory: Path) -> None:
    for child in directory.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cannot_write(target: Path, err: OSError) -> ShardError:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return ShardError(
            f"{target.parent}: no space left while writing {target.name}.",
            hint="Nothing was left behind. `lorashard plan` says how much is needed.",
        )
    reason = os.strerror(err.errno) if err.errno else str(err)
    return ShardError(
        f"{target}: cannot be written ({reason}).", hint="Choose another place with -o."
    )
