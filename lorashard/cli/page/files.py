"""Where a page goes: a new file, or in place of an older page."""

from __future__ import annotations

import os
from pathlib import Path

from lorashard.cli.page.document import BEGINNING
from lorashard.errors import OutputExistsError, ShardError
from lorashard.storage.local import open_regular
from lorashard.storage.targets import resolve_target

_ANOTHER = "Choose another file with --html."


def check_page_target(path: Path) -> None:
    """Raise ShardError if a page cannot go there: a URL, or a file that is not a page of ours."""
    target = _resolved(path)
    try:
        fd = open_regular(target)
    except FileNotFoundError:
        return
    except OSError as err:
        raise _write_error(path, err) from err
    with os.fdopen(fd, "rb") as file:
        if file.read(len(BEGINNING)) not in (BEGINNING.encode(), b""):
            reason = "exists and is not a page that lorashard wrote"
            raise OutputExistsError(path, reason=reason, hint=_ANOTHER)


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all. Raises ShardError."""
    target = _resolved(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.lorashard-partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(target)
    except OSError as err:
        raise _write_error(path, err) from err
    finally:
        beside.unlink(missing_ok=True)


def _resolved(path: Path) -> Path:
    try:
        return resolve_target(path)
    except ShardError as err:
        raise ShardError(
            f"{path}: a page goes into a local file, and this is a URL.", hint=_ANOTHER
        ) from err


def _write_error(path: Path, err: OSError) -> ShardError:
    reason = os.strerror(err.errno) if err.errno else str(err)
    return ShardError(f"{path}: the page cannot be written ({reason}).", hint=_ANOTHER)
