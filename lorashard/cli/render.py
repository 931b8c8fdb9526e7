"""What commands print: data on stdout, talk on stderr, colours only on a terminal.

rich is imported inside, so that `lorashard --help` does not pay for it twice.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHOW_PROGRESS_AFTER_S = 1.0


def print_json(document: Any) -> None:
    """Print data for a script."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_result(result: Mapping[str, Any], place: object, *, as_json: bool, quiet: bool) -> None:
    """What a command that wrote something prints: where it is, or all of it as JSON."""
    if as_json:
        print_json(result)
    elif not quiet:
        print_line(str(place))


def settle_streams() -> None:
    """Make stdout and stderr usable, whatever the shell made of them."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """Print a line of data. Control characters, as in a hostile tensor name, are shown, not sent."""
    sys.stdout.write(_printable(text) + "\n")


def _printable(text: str) -> str:
    return text.translate({code: f"\\x{code:02x}" for code in range(32) if code != ord("\n")})


def say(text: str, *, quiet: bool = False) -> None:
    """Say something to the person at the terminal."""
    if not quiet:
        sys.stderr.write(_printable(text) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, all but the first column to the right; plain text unless on a terminal."""
    print_line(title)
    if not sys.stdout.isatty():  # without rich, which takes as long as the rest of `inspect`
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
    Console(highlight=False).print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print name-value lines."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print_line(f"{name:<{width}}  {value}")


@contextmanager
def progress_bar(label: str, total_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to be told of bytes done; shows a bar on stderr once it takes a second."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    task = bar.add_task(label, total=total_bytes)
    started = time.monotonic()

    def advance(size_bytes: int) -> None:
        if not bar.live.is_started and time.monotonic() - started > SHOW_PROGRESS_AFTER_S:
            bar.start()
        bar.advance(task, size_bytes)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def count_bar(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """The same for things that are counted; it is there from the start."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda number: bar.advance(task, number)


def size(num_bytes: int) -> str:
    """1.23 GB; bytes are decimal, as disks and networks count them."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def ids(numbers: Sequence[int]) -> str:
    """Expert ids in short: 0-63, or 0, 2, 4, … (64)."""
    if not numbers:
        return "none"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers))
    return ", ".join(map(str, numbers[:4])) + f", … ({len(numbers)})"
