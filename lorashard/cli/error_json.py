"""An error as JSON, for `--json`: the same fields from every command."""

from __future__ import annotations

import os
from typing import Any

from lorashard.errors import LorashardError
from lorashard.parameters import with_flags
from lorashard.rules import Rule
from lorashard.storage.system_errors import hint_of

USAGE = "UsageError"


def error_json(
    kind: str,
    message: str,
    hint: str | None,
    exit_code: int,
    where: str | None = None,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """The fields, with options in place of parameters. kind: the name of the class. where: the path or name that it is about."""
    return {
        "error": with_flags(message),
        "hint": None if hint is None else with_flags(hint),
        "exit_code": exit_code,
        "kind": kind,
        "where": where,
        "rule": None if rule is None else rule.id,
    }


def json_of(error: LorashardError) -> dict[str, Any]:
    """The fields of one of our errors."""
    return error_json(
        type(error).__name__,
        error.message,
        hint_of(error),
        error.exit_code,
        where_of(error),
        error.rule,
    )


def where_of(error: BaseException) -> str | None:
    """The file or the part of the adapter that an error is about, where it says."""
    for name in ("path", "where", "filename"):
        value = getattr(error, name, None)
        if isinstance(value, (str, bytes, os.PathLike)):
            return os.fsdecode(value)
    return None
