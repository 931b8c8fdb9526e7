"""docs/messages.md: every message that lorashard's code can raise, with what to do, read from the code itself.

A message is the first argument of an error class; what is filled in is shown as `…`, and a parameter as
the option that the command line makes of it. Where the text is put together
elsewhere, the message is not listed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorashard import errors
from lorashard.parameters import with_flags

_CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.LorashardError)
}
_TITLES = {
    "adapter": "Reading adapters",
    "header": "Headers of safetensors files",
    "storage": "Files, folders and URLs",
    "shards": "Shard directories",
    "split": "split",
    "verify": "verify",
    "convert": "convert",
    "reshard": "reshard",
    "merge": "merge",
    "writing": "Writing shards",
    "transfer": "pull and push",
    "uploading": "Uploading",
    "publish": "Writing shards from a training, and publishing",
    "vllm_plugin": "In vLLM",
    "cli": "Command line",
}
_SHORTEST = 12  # of what is fixed in a message, to be of use in a search

INTRO = """\
# Troubleshooting by message

Search this page for a few words of the message that you see; `…` stands for what is filled in. The second column is the
line that lorashard prints below it. A message that ends in `(rule …)` is listed without that; [rules.md](rules.md) has
the rules. [Errors and exit codes](errors.md) has the classes.
"""


@dataclass(frozen=True, order=True)
class Message:
    """room: the folder or module below lorashard/ that raises it."""

    room: str
    text: str
    hint: str


def make_page(notice: str, package: Path) -> str:
    """The page, with the messages of each room in alphabetical order."""
    found = sorted(set(messages(package)))
    parts = [notice, INTRO]
    for room in sorted({m.room for m in found}, key=_place):
        rows = "".join(f"| {_cell(m.text)} | {_cell(m.hint)} |\n" for m in found if m.room == room)
        parts.append(f"## {_TITLES.get(room, room)}\n\n| message | what to do |\n|---|---|\n{rows}")
    return "\n".join(parts)


def messages(package: Path) -> Iterator[Message]:
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("errors",):
            continue
        reader = _Reader(".".join((package.name, *parts)))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := _class_name(node.func)):
                text = reader.text_of(node, name)
                if text and len(text.replace("…", "")) >= _SHORTEST:
                    hint = with_flags(reader.hint_of(node, name))
                    yield Message(parts[0], with_flags(text), hint)


def _class_name(function: ast.expr) -> str | None:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return name if name in _CLASSES else None


@dataclass(frozen=True)
class _Reader:
    """Reads the texts of one module, with the constants that it fills in."""

    module: str

    def text_of(self, call: ast.Call, name: str) -> str | None:
        """The message as its class makes it: some put a path in front of a reason."""
        named = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
        if named or name in ("HeaderError", "ManifestError"):
            reasons = [*named, *call.args[1:2]]
            reason = self._literal(reasons[0]) if reasons else None
            start = "…: not a valid safetensors file: " if name == "HeaderError" else "…: "
            return reason and f"{start}{reason}."
        text = self._literal(call.args[0]) if call.args else None
        return text and (
            f"…: {text} is not supported." if name == "UnsupportedAdapterError" else text
        )

    def hint_of(self, call: ast.Call, name: str) -> str:
        for keyword in call.keywords:
            if keyword.arg == "hint":
                return self._literal(keyword.value) or ""
        if name in ("HeaderError", "ManifestError"):  # of the class itself
            return _CLASSES[name]("path", "reason").hint or ""  # type: ignore[call-arg]
        return ""

    def _literal(self, node: ast.expr) -> str | None:
        """A text, with … for what is filled in; None if it is made elsewhere."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.Name) and node.id.strip("_").isupper():
            constant = getattr(importlib.import_module(self.module), node.id, None)
            return constant if isinstance(constant, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(
                str(part.value) if isinstance(part, ast.Constant) else self._filled_in(part)
                for part in node.values
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._literal(node.left), self._literal(node.right)
            return None if left is None else left + ("…" if right is None else right)
        return None

    def _filled_in(self, part: ast.expr) -> str:
        value = part.value if isinstance(part, ast.FormattedValue) else part
        return (self._literal(value) if isinstance(value, ast.Name) else None) or "…"


def _place(room: str) -> tuple[int, str]:
    known = list(_TITLES)
    return known.index(room) if room in known else len(known), room


def _cell(text: str) -> str:
    """Text for a table's cell, with nothing in it that Markdown would take for markup."""
    flat = " ".join(text.split())
    for mark in ("\\", "|", "*", "_", "<", "["):
        flat = flat.replace(mark, f"\\{mark}")
    return flat
