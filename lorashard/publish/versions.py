"""What versions of an adapter are called, and which are no longer kept. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection

# A directory of this name, and what requests name as their model.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_adapter_name(text: str) -> bool:
    """Whether an adapter can be called this: letters, digits, dots, underscores and hyphens."""
    return _NAME.fullmatch(text) is not None


def version_name(name: str, version: int) -> str:
    """`policy-v00017`."""
    return f"{name}-v{version:05d}"


def version_of(name: str, found: str) -> int | None:
    """The inverse; None for what `version_name` does not make of `name`."""
    digits = found.removeprefix(f"{name}-v")
    if not re.fullmatch(r"[0-9]{5,}", digits) or found != version_name(name, int(digits)):
        return None
    return int(digits)


def outdated(
    newest: int, served: Collection[int], present: Collection[int], keep: int
) -> tuple[int, ...]:
    """The versions before the last `keep` up to `newest`, in order.

    served: those that a server lists. present: those that have a directory. One that was never
    served takes no other's place, unless fewer than `keep` are served. What is newer is not looked at.
    """
    older = sorted(version for version in {*served, *present} if version < newest)
    counted = [version for version in older if version in served]
    if len(counted) + 1 < keep:
        counted = older
    oldest_kept = [*counted, newest][-keep:][0]
    return tuple(version for version in older if version < oldest_kept)
