"""What commands print: data on stdout, talk on stderr, colours only on a terminal.

In: values. Out: lines, tables, JSON. rich and json are imported where they are used,
so that `lorashard --help` starts at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorashard.errors import LorashardError
from lorashard.parameters import with_flags
from lorashard.rules import with_rule

COUNTED_FROM_R = " (counted from r; --model checks it)"
_LEAST_WIDTH = 80
_INTERRUPTED: list[Callable[[], str]] = []  # what to say if the command is stopped
_PRINTED: list[str] = []  # the kinds of documents that are on stdout: one is all that may be


def print_json(document: Any) -> None:
    """Print data for a script."""
    import json  # noqa: PLC0415 - not for `--help`

    encoding = (sys.stdout.encoding or "utf-8").lower().replace("_", "-")
    ascii_only = encoding not in ("utf-8", "utf8")  # what it lacks would be written as \\xe9
    text = json.dumps(document, indent=2, ensure_ascii=ascii_only)
    sys.stdout.write(text.translate(_IN_JSON) + "\n")
    _PRINTED.append("json")


def printed_json() -> bool:
    """Whether the command has printed its document, as `verify` does before it fails."""
    return bool(_PRINTED)


def print_result(result: Mapping[str, Any], place: object, *, as_json: bool, quiet: bool) -> None:
    """Print the result of a command that wrote something: its place, or everything as JSON."""
    if as_json:
        print_json(result)
    elif not quiet:
        print_line(str(place))


def settle_streams() -> None:
    """Make stdout and stderr usable, whatever the shell made of them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_terminal, encoding = sys.stdout.isatty(), sys.stdout.encoding
        output = io.BufferedWriter(_Output(sys.stdout.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(output, encoding=encoding, line_buffering=is_terminal)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Output(io.FileIO):
    """Standard output. A reader that has gone away, such as `head`, changes nothing for the command."""

    def write(self, data: Any, /) -> int:
        """Write, or drop the data if nobody reads it. Raises LorashardError if the disk is full."""
        try:
            return super().write(data)
        except BrokenPipeError:
            self._drop_the_rest()
            return len(data)
        except OSError as err:
            self._drop_the_rest()
            _PRINTED.append("nothing")
            raise LorashardError(
                f"The output cannot be written ({err.strerror}).",
                hint="Whatever the command has written elsewhere is complete.",
            ) from err

    def _drop_the_rest(self) -> None:
        """Send what is still buffered nowhere, so that the end of the program does not fail on it."""
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def print_line(text: str) -> None:
    """Print one line of data, with nothing in it that a terminal would act on."""
    sys.stdout.write(printable(text) + "\n")


# What a terminal acts on, or shows in another order or not at all: C0 (with the newline, so that a
# name cannot add lines), DEL, C1, line separators, and the marks and overrides of writing direction.
_UNPRINTABLE = (
    *range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)  # fmt: skip
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNPRINTABLE}


# What JSON allows in a text and a terminal obeys: C1, DEL, marks of writing direction.
_IN_JSON = {code: f"\\u{code:04x}" for code in _UNPRINTABLE if code >= 0x7F}


def printable(text: str) -> str:
    """The text on one line, with control characters (of a hostile tensor name) shown escaped."""
    return text.translate(_SHOWN)


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line for the person at the terminal, on stderr."""
    if not quiet:
        sys.stderr.write(printable(text) + "\n")


def if_interrupted(say_what: Callable[[], str]) -> None:
    """From now on, this is said if the command is stopped: what is done, and how to go on."""
    _INTERRUPTED[:] = [say_what]


def say_interrupted(how: str) -> None:
    """Say that the command was stopped. how: interrupted, for Ctrl-C."""
    say("; ".join([how, *(say_what() for say_what in _INTERRUPTED)]))


def say_error(message: str, hint: str | None, rule_id: str | None) -> None:
    """Say what is wrong, and by which rule if there is one; and on a line of its own what to do."""
    say(f"error: {message if rule_id is None else with_rule(message, rule_id)}")
    if hint is not None:
        say(f"  {hint}")


def say_note(text: str, *, about: str | None = None, quiet: bool = False) -> None:
    """Say something that the core has noticed. about: the adapter, where there are several."""
    where = "" if about is None else f"{about}: "
    say(f"note: {where}{with_flags(text)}", quiet=quiet)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, right-aligned but for its first column; plain text unless on a terminal."""
    print_line(title)
    rows = [tuple(map(printable, row)) for row in rows]
    if not sys.stdout.isatty():  # no rich: importing it takes as long as the rest of `inspect`
        widths = [max(map(len, column)) for column in zip(columns, *rows)]
        for row in (columns, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
            print_line("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)  # rich drops columns that do not fit
    console.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print name-value lines."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print_line(f"{name:<{width}}  {value}")


def size(num_bytes: int) -> str:
    """1.23 GB; bytes are decimal, as disks and networks count them."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def ids(numbers: Sequence[int]) -> str:
    """Numbers of experts or ranks, abbreviated: 0-63, or 0, 2, 4, 6, … (64)."""
    if not numbers:
        return "none"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers))
    return ", ".join(map(str, numbers[:4])) + f", … ({len(numbers)})"
