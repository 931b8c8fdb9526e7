"""The directory of a version that no one uses -> gone, or left alone with the reason.

In: a path that names a version. It is renamed before its files are deleted: whatever kills the process,
under the version's name is a whole directory or none. `clear_removed` deletes what was left of such a
run, `clear_unfinished` what a killed writer left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.shards.directory import holds_only_shards
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.locked_directory import remove_directory
from lorashard.storage.spares import SPARE_NAME, keep_spare
from lorashard.storage.staging import clear_leftovers, staged_targets

_REMOVED_SUFFIX = ".lorashard-removed"


def remove_shards(path: Path, *, as_spare: bool) -> str | None:
    """Delete a shard directory. Why it was left alone; None if it is gone.

    as_spare: in memory, its files may stay for the next version, where nobody takes them for shards.
    """
    try:
        if not os.path.lexists(path):
            return None
        if path.is_symlink() or not path.is_dir():
            return "is not a directory"
        if not holds_only_shards(path, frozenset(os.listdir(path))):
            return "holds something else than shards"
        aside = path.with_name(f".{path.name}{_REMOVED_SUFFIX}")
        remove_directory(aside)
        os.rename(path, aside)
    except OSError as err:
        return f"cannot be removed ({err.strerror})"
    if not (as_spare and _has_become_spare(aside)):
        remove_directory(aside)
    return None


def remove_spare(directory: Path) -> None:
    """Delete what the next version would have been written to."""
    remove_directory(directory / SPARE_NAME)


def _has_become_spare(aside: Path) -> bool:
    try:
        (aside / MANIFEST_NAME).unlink()  # first: without it nobody takes the rest for shards
        return keep_spare(aside, lambda name: name not in (CONFIG_NAME, WEIGHTS_NAME))
    except OSError:
        return False


def clear_unfinished(directory: Path, is_outdated: Callable[[str], bool]) -> None:
    """Delete what killed writers left of outdated versions: in memory it would stay for good.

    A writer that is at work has locked what it writes, which stays.
    """
    try:
        targets = staged_targets(directory)
    except OSError:
        return  # the next run tries again
    for target in targets:
        if is_outdated(target.name):
            clear_leftovers(target)


def clear_removed(directory: Path, is_version: Callable[[str], bool]) -> None:
    """Delete what a killed run was about to delete."""
    try:
        names = os.listdir(directory)
    except OSError:
        return  # the next run tries again
    for name in names:
        removed = name.startswith(".") and name.endswith(_REMOVED_SUFFIX)
        if removed and is_version(name[1 : -len(_REMOVED_SUFFIX)]):
            remove_directory(directory / name)
