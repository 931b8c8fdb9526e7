"""Small files read whole, configs and JSON: from a path, or a folder here or elsewhere.

Files over 16 MiB are refused, so that a wrong file cannot fill the memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lorashard.errors import AdapterError
from lorashard.header import GIT_LFS_BEGIN, GIT_LFS_POINTER
from lorashard.storage.local import open_regular
from lorashard.storage.remote import Location, RemoteFolder

MAX_SMALL_FILE_BYTES = 16 * 2**20
_MAX_DEPTH = 100  # far above any real file


def read_small_file(folder: Location, name: str) -> bytes:
    """A small file of a folder. Raises AdapterError if it is missing or absurdly large."""
    if not isinstance(folder, RemoteFolder):
        return read_small_path(folder / name)
    file = folder.file(name)
    if file is None:
        raise AdapterError(f"{folder}: no {name}.", hint="Check the path.")
    _check_size(file.name, file.size_bytes)
    return file.read(0, file.size_bytes)


def read_small_path(path: Path) -> bytes:
    """A small local file. Raises AdapterError if it is missing or absurdly large."""
    try:
        return read_bounded(path)
    except OSError as err:
        raise AdapterError(f"{path}: {err.strerror}.", hint="Check the path.") from err


def read_json(path: Path) -> Any:
    """Parsed JSON of a small local file. Raises AdapterError with the place of a mistake."""
    return parse_json(read_small_path(path), path)


def parse_json(raw: bytes, path: Location) -> Any:
    """Parsed JSON; `path` is for messages. Raises AdapterError with the place of a mistake."""
    try:
        return _load_json(raw)
    except (ValueError, RecursionError) as err:
        raise AdapterError(f"{path}: not JSON ({err}).", hint="Check the path.") from err


def load_writable_json(raw: bytes) -> Any:
    """Parsed JSON that can be written again: no lone surrogates, and not nested too deeply.

    Raises ValueError or RecursionError.
    """
    document = _load_json(raw)
    if b"\\u" in raw or b"\xed" in raw:  # all that a surrogate can come from
        json.dumps(document, ensure_ascii=False).encode()
    return document


def is_git_lfs_pointer(raw: bytes) -> bool:
    """Whether a file that begins like this is what `git clone` without git-lfs leaves of it."""
    return raw.startswith(GIT_LFS_BEGIN)


def _load_json(raw: bytes) -> Any:
    if is_git_lfs_pointer(raw):
        raise ValueError(GIT_LFS_POINTER)
    document = json.loads(raw)
    _check_depth(document)
    return document


def _check_depth(document: Any) -> None:
    """What can be read may be too deep for those who follow it down, so there is one limit for all."""
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [
            value
            for container in level
            if isinstance(container, (dict, list))
            for value in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def read_bounded(
    path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES, dir_fd: int | None = None
) -> bytes:
    """A local file whole, opened as `open_regular` does.

    Raises AdapterError if it is larger than that, OSError if it is no file.
    """
    with os.fdopen(open_regular(path, dir_fd), "rb") as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        content = file.read(max_bytes + 1)
    _check_size(path, len(content), max_bytes)
    return content


def _check_size(name: str | Path, size_bytes: int, max_bytes: int = MAX_SMALL_FILE_BYTES) -> None:
    if size_bytes > max_bytes:
        raise AdapterError(f"{name}: larger than {max_bytes} bytes.", hint="Save again.")
