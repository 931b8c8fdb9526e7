"""A directory that appears whole or not at all.

In: a target path, and a function that says whether what is there may be replaced. Out: an empty
staging directory beside the target. When the caller has filled it, it is synced and renamed.
Whatever kills the process, the target is absent, the old one, or the finished new one. The staging
directory's name says what it is, and the next run for the same target clears it.

A mount point cannot be renamed over. There the staging directory is inside, and files are moved one
by one, last the one that marks the content complete. A staging directory that is still there then
shows that a move was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorashard.errors import OutputExistsError, ShardError
from lorashard.storage.local import sync_directory
from lorashard.storage.locked_directory import (
    RESUMABLE_NAME,
    LockedDirectory,
    lock_descriptor,
    locked_directory,
    remove_directory,
)
from lorashard.storage.syscalls import exchange, rename_to_free
from lorashard.storage.targets import (
    explained_write_errors,
    made_parents,
    resolve_target,
    work_path,
)

_STAGING_NAME = ".lorashard-partial"
_MOVING_NAME = (
    ".moving"  # in the staging directory of a mount point while files are moved; lists them
)
_IGNORED_IN_MOUNTS = frozenset({"lost+found", _STAGING_NAME, RESUMABLE_NAME})
_NOTHING_LEFT = "Nothing was left behind. `lorashard plan` says how much is needed."

# Says of a directory, given the names in it, whether it may be replaced.
Replaceable = Callable[[Path, frozenset[str]], bool]


@contextmanager
def staged_directory(
    target: Path, *, last: str, force: bool, replaceable: Replaceable, sync: bool = True
) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well.

    last: the file that marks the content complete. force: replace a `target` for which
    `replaceable` holds, atomically.
    sync: wait until the disk has it; without, a machine that crashes may leave only some of it.
    Raises OutputExistsError if the target is in the way, ShardError if it cannot be written.
    """
    target = resolve_target(target)
    check_target(target, force=force, replaceable=replaceable)
    staging = staging_path(target)
    with (
        explained_write_errors(target, full_disk=_NOTHING_LEFT),
        made_parents(target, sync=sync),
        locked_directory(staging, target) as locked,
    ):
        _clear_leftovers(locked, target)
        try:
            yield staging
            _sync_if(sync, staging)
            # Again, because something may have appeared there during the work.
            check_target(target, force=force, replaceable=replaceable)
            if staging.parent == target:
                _move_files(staging, target, last, sync=sync)
            else:
                _rename(staging, target, force=force)
                _sync_if(sync, target.parent)
        finally:
            locked.remove()


def clear_leftovers(target: Path) -> None:
    """Clear what a killed run left beside a `target` that is finished. Another one's work stays."""
    target = resolve_target(target)
    staging = staging_path(target)
    if not os.path.lexists(staging) and not os.path.lexists(_aside(target)):
        return
    with suppress(ShardError, OSError), locked_directory(staging, target) as locked:
        _clear_leftovers(locked, target)
        locked.remove()


def staged_targets(folder: Path) -> list[Path]:
    """The targets in `folder` that a run works on, or was killed at. Raises OSError."""
    begin, end = len("."), len(_STAGING_NAME)
    return [
        folder / name[begin:-end]
        for name in os.listdir(folder)
        if name.startswith(".") and name.endswith(_STAGING_NAME) and len(name) > begin + end
    ]


def staging_path(target: Path) -> Path:
    """Where `staged_directory` works. target: as resolve_target gives it."""
    return work_path(target, _STAGING_NAME)


def check_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Raise OutputExistsError unless `target` is free, or may be replaced."""
    target = resolve_target(target)
    with explained_write_errors(target, full_disk=_NOTHING_LEFT):
        if not os.path.lexists(target):
            return
        names = _names(target) if target.is_dir() else None
    if names == frozenset() or (names and _is_unfinished_move(target, names)):
        return
    if names is None or not replaceable(target, names):
        raise OutputExistsError(
            target,
            reason="exists and is not what lorashard would write there",
            hint="lorashard leaves it alone, even with `force=True`. Choose another place with `out`.",
        )
    if not force:
        raise OutputExistsError(
            target,
            reason="exists",
            hint="`force=True` replaces it atomically. Or choose another place with `out`.",
        )


def _names(path: Path) -> frozenset[str]:
    """The names in a directory, except those that every mount point may have."""
    names = frozenset(os.listdir(path))
    return names - _IGNORED_IN_MOUNTS if os.path.ismount(path) else names


def _is_unfinished_move(target: Path, names: frozenset[str]) -> bool:
    """Whether a run was killed while moving files into this mount point, with nothing else in it."""
    moving = target / _STAGING_NAME / _MOVING_NAME
    try:
        return os.path.ismount(target) and names <= set(moving.read_text().splitlines())
    except OSError:
        return False


def _clear_leftovers(staging: LockedDirectory, target: Path) -> None:
    """Clear what a killed run left in the staging directory, in a mount point, and aside."""
    if staging.path.parent == target and _is_unfinished_move(target, _names(target)):
        for name in _names(target):
            (target / name).unlink()
    staging.clear()
    aside = _aside(target)
    if os.path.lexists(target):
        remove_directory(aside)
    elif aside.exists():  # killed between two renames: the old target is still the valid one
        os.rename(aside, target)


def _rename(staging: Path, target: Path, *, force: bool) -> None:
    """Put `staging` in the place of `target`; an old target is swapped out in the same instant."""
    if target.is_dir():
        staging.chmod(target.stat().st_mode & 0o7777)
    if not os.path.lexists(target):
        try:
            if not rename_to_free(staging, target):
                os.rename(staging, target)
        except FileExistsError as err:
            raise _appeared(target) from err
    elif not os.listdir(target):
        os.rename(staging, target)  # fails if something has been put into it since
    elif force:
        _replace(staging, target)
    else:
        raise _appeared(target)


def _sync_if(sync: bool, directory: Path) -> None:
    if sync:
        sync_directory(directory)


def _appeared(target: Path) -> OutputExistsError:
    return OutputExistsError(
        target,
        reason="appeared while it was being written",
        hint="lorashard leaves it alone. Choose another place with `out`.",
    )


def _replace(staging: Path, target: Path) -> None:
    aside = _aside(target)
    old = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # After the exchange the old content has the staging directory's name: with the lock no
        # other run takes it for a staging directory of its own.
        lock_descriptor(old, target, target)
        if exchange(staging, target):
            # The new one is in place, so nothing from here on is a failure; the old one must go.
            try:
                with suppress(OSError):
                    os.rename(staging, aside)
            finally:
                LockedDirectory(staging, old).remove()
        else:
            os.rename(target, aside)
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(aside, target)
                raise
        remove_directory(aside)
    finally:
        os.close(old)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.lorashard-old")


def _move_files(staging: Path, target: Path, last: str, *, sync: bool) -> None:
    """Replace the content of a mount point; without `last` nobody takes it for finished."""
    old = _names(target)
    new = sorted(child.name for child in staging.iterdir() if child.name != last)
    (staging / _MOVING_NAME).write_text("\n".join(sorted({*old, *new} - {last})))
    _sync_if(sync, staging)
    (target / last).unlink(missing_ok=True)
    _sync_if(sync, target)
    moved: list[Path] = []
    try:
        for name in old - {last}:
            (target / name).unlink()
        for name in (*new, last):
            if name == last:
                _sync_if(sync, target)
            moved.append(target / name)
            os.rename(staging / name, target / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    _sync_if(sync, target)
