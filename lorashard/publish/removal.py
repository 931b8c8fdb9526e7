"""The directory of a version that no one uses -> gone, or left alone with the reason.

In: a path that names a version. It is renamed before its files are deleted: whatever kills the process,
under the version's name is a whole directory or none. `clear_removed` deletes what was left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lorashard.shards.directory import holds_only_shards
from lorashard.storage.locked_directory import remove_directory

_REMOVED_SUFFIX = ".lorashard-removed"


def remove_shards(path: Path) -> str | None:
    """Delete a shard directory. Why it was left alone; None if it is gone."""
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
    remove_directory(aside)
    return None


def clear_removed(directory: Path, is_version: Callable[[str], bool]) -> None:
    """Delete what a killed run was about to delete."""
    for name in os.listdir(directory):
        removed = name.startswith(".") and name.endswith(_REMOVED_SUFFIX)
        if removed and is_version(name[1 : -len(_REMOVED_SUFFIX)]):
            remove_directory(directory / name)
