"""One line of the results: a command, its rival and the target."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.measure import Run
from tests.bench.rounds import median_ratio


@dataclass(frozen=True, slots=True)
class Target:
    """The most that a command may take."""

    limit: float
    unit: Literal["x", "s"]  # times the rival's time, or seconds


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one command, against at most one rival."""

    form: str  # of the adapter; empty if none was involved
    what: str
    seconds: float  # median
    peak_rss_bytes: int  # of the hungriest run
    size_bytes: int | None  # read by the command; None if size says nothing about it
    rival: str | None
    ratio: float | None  # median of the per-round ratios to the rival
    target: Target | None
    runs: tuple[Run, ...]
    size_ratio: float | None = None  # of size_bytes to the rival's, where they differ

    @property
    def cpu_seconds(self) -> float:
        """User and system time, of all threads: median."""
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def spread(self) -> float:
        """Of the seconds: the slowest run less the fastest, as a part of the median."""
        seconds = [run.seconds for run in self.runs]
        return (max(seconds) - min(seconds)) / self.seconds

    @property
    def is_target_met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        value = self.ratio if self.target.unit == "x" else self.seconds
        return value is not None and value <= self.target.limit


def make_row(
    form: str,
    what: str,
    runs: Sequence[Run],
    *,
    size_bytes: int | None = None,
    rival: tuple[str, Sequence[Run]] | None = None,
    target: Target | None = None,
    size_ratio: float | None = None,
    bytes_of_rival: float = 1.0,
) -> Row:
    """A row from its runs. bytes_of_rival: for each byte of this command, in a ratio for a byte."""
    return Row(
        form=form,
        what=what,
        seconds=statistics.median(run.seconds for run in runs),
        peak_rss_bytes=max(run.peak_rss_bytes for run in runs),
        size_bytes=size_bytes,
        rival=rival[0] if rival else None,
        ratio=median_ratio(runs, rival[1]) * bytes_of_rival if rival else None,
        target=target,
        runs=tuple(runs),
        size_ratio=size_ratio,
    )
