"""One or several paths in a call: `inspect` and `verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorashard.cli import render
from lorashard.cli.error_json import json_of
from lorashard.errors import BatchError, LorashardError

# Looks at a path -> its document, and what to raise although there is one.
Look = Callable[[str], tuple[dict[str, Any], LorashardError | None]]


def look_at_each(paths: Sequence[str], look: Look, *, key: str, as_json: bool) -> None:
    """Call `look` for each path. With one path, its document and error are the command's own.

    With several, an error does not stop the others, and with --json the documents are a list.
    key: what a document calls its path. Raises LorashardError; BatchError for several paths.
    """
    documents, errors = [], []
    for path in paths:
        try:
            document, error = look(path)
        except LorashardError as err:
            if len(paths) == 1:
                raise
            document, error = {key: path} | json_of(err), err
        documents.append(document)
        if error is not None:
            errors.append(error)
            if len(paths) > 1:
                shown = json_of(error)
                render.say_error(shown["error"], shown["hint"], shown["rule"])
    if as_json:
        render.print_json(documents if len(paths) > 1 else documents[0])
    if errors and len(paths) == 1:
        raise errors[0]
    if errors:
        raise BatchError(errors, len(paths), noun="paths", hint="The messages above say why.")
