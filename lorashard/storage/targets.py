"""The place that a user named for output: its path, the folders above it, what to say if it fails.

In: a path as it was typed, or an OSError. Out: an absolute path, parents that go away again if the
work fails, a ShardError that says what to do.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorashard.errors import NoRoomError, ShardError
from lorashard.storage.local import sync_directory

# A Path has one slash left of the two in a URL.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def resolve_target(target: Path) -> Path:
    """An absolute path; of a link to a directory, the directory, so that the link stays one.

    Raises ShardError for a URL, which would name a local folder such as `s3:`.
    """
    if url := _URL.match(str(target)):
        slashes = "///" if url[1] == "file" else "//"
        shown = f"{url[1]}:{slashes}{str(target)[url.end() :]}"
        raise ShardError(
            f"{shown}: output goes to a local directory, and this is a URL.",
            hint="Name a local directory with `out`. `lorashard push` and push_shards upload shards; on "
            "the command line, split, reshard, merge and convert upload what they make.",
        )
    is_link = os.path.islink(target)  # noqa: PTH114 - quiet on odd names
    return Path(os.path.realpath(target) if is_link else os.path.abspath(target))


def work_path(target: Path, name: str) -> Path:
    """Where to work on `target` so that a rename can finish it: beside it, or in a mount point."""
    return target / name if os.path.ismount(target) else target.parent / f".{target.name}{name}"


@contextmanager
def made_parents(target: Path, *, sync: bool = True) -> Iterator[None]:
    """Make the folders above `target`; remove those that are still empty if the block fails.

    sync: wait until the disk has their names.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    for folder in missing if sync else ():
        sync_directory(folder.parent)


@contextmanager
def explained_write_errors(target: Path, *, full_disk: str) -> Iterator[None]:
    """An OSError in the block becomes a ShardError. full_disk: what to do about one.

    One that is about something else stays what it is: a connection, or a file elsewhere.
    """
    try:
        yield
    except OSError as err:
        if _is_elsewhere(target, err):
            raise
        raise write_error(target, err, full_disk=full_disk) from err


def _is_elsewhere(target: Path, err: OSError) -> bool:
    """Whether an error cannot come from writing `target`."""
    if isinstance(err, (ConnectionError, TimeoutError)):
        return True
    if not isinstance(err.filename, (str, os.PathLike)) or not Path(err.filename).is_absolute():
        return False  # most calls on open files do not say which
    named = Path(err.filename)
    work = target.parent
    return not (named.is_relative_to(work) or work.is_relative_to(named))


def write_error(target: Path, err: OSError, *, full_disk: str) -> ShardError:
    """Says why `target` cannot be written and what to do."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoomError(
            f"{target.parent}: no space left while writing {target.name}.", hint=full_disk
        )
    reason = os.strerror(err.errno) if err.errno else str(err)
    return ShardError(
        f"{target}: cannot be written ({reason}).", hint="Choose another place with `out`."
    )
