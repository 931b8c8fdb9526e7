"""What Python does to the files below a folder, call by call, for tests/fault_runner.py.

Replaced are the functions of `os` and `io` that lorashard and Python's own modules call, and the two of
libc that lorashard calls itself. A file that C code opens, such as safetensors' `safe_open`, is not seen.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorashard.storage import syscalls

READING = ("open", "list", "read")
WRITING = ("mkdir", "write", "truncate", "fsync", "rename")
CLEANING = ("unlink", "rmdir")

# What is to become of a call, by its name: None lets it through, "short" does half of it. May raise.
Decide = Callable[[str], str | None]
# Told of each call that succeeded and changed something: name, inode, path; the source of a rename.
Done = Callable[..., None]

_BUFFERED = {"r": io.BufferedReader, "w": io.BufferedWriter}


def follow(  # noqa: C901 - one replacement after the other
    folder: str, decide: Decide, done: Done = lambda *_: None
) -> None:
    """Ask `decide` before each call on something below `folder`, which is an absolute path."""
    below = folder.rstrip("/") + "/"

    def path_of(place: Any, dir_fd: int | None = None) -> str | None:
        try:
            if isinstance(place, int):
                path = _name_of(place)
            elif dir_fd is not None:
                path = f"{_name_of(dir_fd)}/{os.fsdecode(place)}"
            else:
                path = os.path.abspath(os.fsdecode(place))
        except OSError:
            return None
        return path if path == folder or path.startswith(below) else None

    def ask(name: str, place: Any) -> None:
        """As the system does, an error names the path that the call was given."""
        try:
            decide(name)
        except OSError as err:
            err.filename = place
            raise

    def on_path(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(place: Any = ".", *args: Any, **options: Any) -> Any:
            path = path_of(place, options.get("dir_fd"))
            if path is None:
                return original(place, *args, **options)
            ask(name, place)
            result = original(place, *args, **options)
            if name == "open" and args and args[0] & os.O_CREAT:
                done("create", os.fstat(result).st_ino, path)
            if name == "mkdir":
                with suppress(FileNotFoundError):  # another process may have moved it since
                    done("mkdir", os.lstat(path).st_ino, path)
            if name in CLEANING:
                done(name, 0, path)
            return result

        return call

    def renaming(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **options: Any) -> None:
            path = path_of(target)
            if path is not None:
                ask("rename", source)
            inode = os.lstat(source).st_ino
            original(source, target, **options)
            if path is not None:
                done("rename", inode, path, os.path.abspath(source))

        return call

    def on_file(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: Any, *args: Any) -> Any:
            path = path_of(fd)
            if path is None:
                return original(fd, *args)
            if decide(name) == "short" and name in ("read", "write"):
                args = (_half(args[0]), *args[1:])
            result = original(fd, *args)
            if name != "read":
                done(name, os.fstat(fd).st_ino, path)
            return result

        return call

    class Followed(io.FileIO):
        """A file that `open` opens."""

        def readinto(self, buffer: Any) -> int | None:
            view = memoryview(buffer).cast("B")
            return super().readinto(_half(view) if decide("read") == "short" else view)

        def readall(self) -> bytes:
            decide("read")
            return super().readall()

        def read(self, size: int | None = -1) -> bytes | None:
            if size is None or size < 0:
                return self.readall()
            return super().read(max(1, size // 2) if decide("read") == "short" else size)

        def write(self, data: Any) -> int | None:
            view = memoryview(data).cast("B")
            size = super().write(_half(view) if decide("write") == "short" else view)
            done("write", os.fstat(self.fileno()).st_ino, path_of(self.fileno()) or "")
            return size

    opened = io.open

    def open_followed(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, closefd: bool = True,
        opener: Any = None,
    ) -> Any:  # fmt: skip
        path = path_of(file)
        if path is None or "+" in mode:
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            ask("open", file)
        raw = Followed(file, mode.translate({ord("t"): None, ord("b"): None}), closefd, opener)
        if not isinstance(file, int) and "r" not in mode:
            done("create", os.fstat(raw.fileno()).st_ino, path)
        if buffering == 0:
            return raw
        buffered = _BUFFERED["r" if "r" in mode else "w"](raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    renameat2 = syscalls._renameat2

    def rename_or_exchange(old: Any, new: Any, flags: int) -> int:
        path = path_of(new)
        inode = os.lstat(old).st_ino
        if path is not None:
            try:
                decide("rename")
            except OSError as err:
                return err.errno or 0
        code = renameat2(old, new, flags)
        if code == 0 and path is not None:
            done("rename", inode, path, os.path.abspath(old))
        return code

    fallocate = getattr(syscalls._libc, "fallocate", None)

    def reserved(fd: int, *args: Any) -> int:
        if path_of(fd) is not None:
            try:
                decide("truncate")
            except OSError as err:
                ctypes.set_errno(err.errno or 0)
                return -1
        return fallocate(fd, *args)  # type: ignore[misc]

    for function in ("open", "mkdir", "unlink", "rmdir"):
        setattr(os, function, on_path(function, getattr(os, function)))
    for function in ("listdir", "scandir"):
        setattr(os, function, on_path("list", getattr(os, function)))
    for function in ("rename", "replace"):
        setattr(os, function, renaming(getattr(os, function)))
    files = {
        "read": ("read", "pread", "preadv"), "write": ("write", "pwrite", "pwritev"),
        "truncate": ("truncate", "ftruncate"), "fsync": ("fsync",),
    }  # fmt: skip
    for name, functions in files.items():
        for function in functions:
            setattr(os, function, on_file(name, getattr(os, function)))
    if hasattr(os, "sendfile"):  # of a copy; shutil goes on with what `open` gives
        os.sendfile = _not_implemented  # type: ignore[assignment]
    builtins.open = io.open = open_followed  # type: ignore[assignment]
    syscalls._renameat2 = rename_or_exchange
    if fallocate is not None:
        syscalls._libc.fallocate = reserved


def _name_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _half(data: Any) -> Any:
    """The first half of what is to be read or written, one byte at least."""
    if isinstance(data, int):
        return max(1, data // 2)
    if not isinstance(data, (list, tuple)):
        view = memoryview(data).cast("B")
        return view[: max(1, len(view) // 2)]
    left, pieces = max(1, sum(map(len, data)) // 2), []
    for piece in data:
        pieces.append(memoryview(piece).cast("B")[:left])
        left -= len(pieces[-1])
        if left <= 0:
            break
    return pieces


def _not_implemented(*_: Any) -> int:
    raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
