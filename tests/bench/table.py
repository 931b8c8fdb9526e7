"""Print the results as a table."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from tests.bench.rows import Row


def _speed(row: Row) -> str:
    if row.size_bytes is None:
        return ""
    return f"{row.size_bytes / 1e9 / row.seconds:.2f}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    moved = "" if row.size_ratio is None else f", {row.size_ratio:.3f}x the bytes"
    return f"{row.ratio:.2f}x {row.rival}{moved}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    # Words, not colour alone: the table ends up in logs and issues.
    verdict = "[green]met[/]" if row.is_target_met else "[red bold]MISSED[/]"
    return f"≤ {row.target.limit:g}{row.target.unit} {verdict}"


def print_table(title: str, rows: Sequence[Row], machine: Mapping[str, str]) -> None:
    table = Table(title=title)
    table.add_column("adapter")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    table.add_column("spread", justify="right")
    table.add_column("CPU s", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("time relative to")
    table.add_column("target")
    table.add_column("peak MB", justify="right")
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        table.add_row(
            row.form,
            row.what,
            f"{row.seconds:.3f}",
            f"{row.spread:.0%}",
            f"{row.cpu_seconds:.2f}",
            _speed(row),
            _ratio(row),
            _target(row),
            f"{row.peak_rss_bytes / 1e6:.0f}",
            end_section=following is None or following.form != row.form,
        )
    # A pipe has no width: without this rich would fold the table to 80 columns.
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
