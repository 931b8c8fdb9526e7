"""An error of the operating system -> what it means for the user. Pure."""

from __future__ import annotations

import errno
import os

from lorashard.errors import LorashardError

_HINTS = {
    errno.EACCES: "Check the permissions of the file and of the folders above it.",
    errno.EPERM: "Check the permissions of the file and of the folders above it.",
    errno.EMFILE: "Too many files are open at once; raise the limit (`ulimit -n`).",
    errno.ENFILE: "Too many files are open on this machine.",
    errno.ENOSPC: "Free some space, and run the same command again.",
    errno.EDQUOT: "Free some of your quota, and run the same command again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "A link leads back to itself; remove it, or name what it should lead to.",
    errno.ENOTDIR: "A part of the path is a file; check the path.",
    errno.ENOENT: "Check the path.",
    errno.EIO: "The disk or the network file system does not answer as it should.",
    errno.ESTALE: "The network file system has replaced the file; run the command again.",
}


def describe(error: OSError) -> tuple[str, str] | None:
    """What happened where, and what to do; None if it is no matter of files and their system."""
    hint = _HINTS.get(error.errno or 0)
    if error.filename is None and error.errno == errno.ENOENT and not _has_current_folder():
        return "The current folder does not exist any more.", "Change to another one."
    if hint is None or error.filename is None:
        return None
    return f"{os.fsdecode(error.filename)}: {os.strerror(error.errno or 0)}.", hint


def _has_current_folder() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 - what Path.cwd calls
    except FileNotFoundError:
        return False
    return True


def better_hint(error: BaseException) -> str | None:
    """The hint for the error of the operating system that caused this one, if there is a better one.

    "Copy the file again" does not help where nobody may read it.
    """
    cause = error.__cause__
    if not isinstance(cause, OSError) or cause.errno in (errno.ENOENT, errno.ENOSPC, errno.ENOTDIR):
        return None
    return _HINTS.get(cause.errno or 0)


def hint_of(error: LorashardError) -> str | None:
    """What to tell the user to do: the better hint, or the error's own."""
    return better_hint(error) or error.hint
