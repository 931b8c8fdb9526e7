"""A directory beside a target in which one process at a time works.

In: the target. Out: a directory whose name says what it is for, locked, so that a second run for
the same target is refused. The name can be guessed, and others may write in the same folder: so a
link of that name is refused, never followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorashard.errors import OutputExistsError, ShardError
from lorashard.storage.local import open_regular, write_new
from lorashard.storage.targets import explained_write_errors, made_parents, work_path

RESUMABLE_NAME = ".lorashard-pull"
FULL_DISK_HINT = "Free some space and run the same command again; what was fetched is kept."


@dataclass(frozen=True, slots=True)
class LockedDirectory:
    """descriptor: of the open directory; the lock lasts until it is closed."""

    path: Path
    descriptor: int

    def is_in_place(self) -> bool:
        """Whether `path` still names this directory, and not one that was made there since."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def clear(self) -> None:
        """Remove everything in it."""
        for child in self.path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def remove(self) -> None:
        """Remove it, unless its path names another directory by now."""
        if self.is_in_place():
            remove_directory(self.path)


@contextmanager
def locked_directory(path: Path, target: Path) -> Iterator[LockedDirectory]:
    """Make `path` unless it exists, and lock it for the length of the block.

    target: what is written, for the messages.
    Raises OutputExistsError if another process has locked it, ShardError if its name is taken by
    something that is not a directory, OSError if it cannot be made.
    """
    locked = _lock(path, target)
    try:
        yield locked
    finally:
        os.close(locked.descriptor)


@contextmanager
def resumable_directory(target: Path, *, marker: str, content: bytes) -> Iterator[Path]:
    """A locked directory beside `target` whose files a later run continues with if this one fails.

    They belong to the `content` of the file `marker` in it, and are removed if that is another one.
    The directory is removed when the block ends well, and kept otherwise.
    target: as resolve_target gives it.
    Raises OutputExistsError if another process works in it, ShardError if it cannot be written.
    """
    path = work_path(target, RESUMABLE_NAME)
    with (
        explained_write_errors(target, full_disk=FULL_DISK_HINT),
        made_parents(target),
        locked_directory(path, target) as locked,
    ):
        if not has_content(path / marker, content):
            locked.clear()
            write_new(path / marker, content)
        yield path
        locked.remove()


def lock_descriptor(descriptor: int, target: Path, work: Path) -> None:
    """Lock an open directory until it is closed. Raises OutputExistsError if it is locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise OutputExistsError(
            target,
            reason="another lorashard is writing it",
            hint=f"Wait until it is done, or stop it; it works in {work}.",
        ) from err


def has_content(path: Path, content: bytes) -> bool:
    """Whether the file exists and holds exactly these bytes."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(len(content) + 1) == content
    except OSError:
        return False


def remove_directory(path: Path) -> None:
    """Remove a directory, even if a signal arrives meanwhile."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _lock(path: Path, target: Path) -> LockedDirectory:
    while True:
        with suppress(FileExistsError):
            path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its last owner has just removed it
        except OSError as err:
            if err.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _name_is_taken(path, target) from err
            raise
        locked = LockedDirectory(path, descriptor)
        try:
            lock_descriptor(descriptor, target, path)
            if locked.is_in_place():
                return locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner renamed or removed it before the lock


def _name_is_taken(path: Path, target: Path) -> ShardError:
    return ShardError(
        f"{target}: cannot be written, because {path} is a link or a file.",
        hint="Remove it if it is yours, or choose another place with `out`.",
    )
