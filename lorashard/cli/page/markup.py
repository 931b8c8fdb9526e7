"""HTML from values: `tag` builds an element, and text in it is escaped unless it is `Html` already.

Names in an adapter are its author's: they can hold markup, quotes, and characters that turn the direction
of writing.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from lorashard.cli.render import printable

_VOID = frozenset({"meta", "path", "rect"})


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Text as it is to be read, with what is not shown, or not UTF-8, as an escape."""
    shown = printable(text).encode("utf-8", "backslashreplace").decode()
    return Html(html.escape(shown))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """An element. Attributes: `class_` for `class`, `_` for `-`; None leaves one out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>" if name == "meta" else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str], separator: str = "") -> Html:
    """Parts one after the other, each escaped unless it is HTML."""
    return Html(separator.join(p if isinstance(p, Html) else escaped(p) for p in parts))


def name_of(text: str) -> Html:
    """A name of an adapter's, whose direction of writing changes nothing around it."""
    return tag("bdi", text)
