"""Run commands against each other, so that a slow moment of the machine hits them all."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.measure import Run, run_command, touch_memory


@dataclass(frozen=True, slots=True)
class Contestant:
    """A command, and what to set up right before each of its runs (untimed)."""

    name: str
    command: tuple[str, ...]
    prepare: Callable[[], None]
    environment: Mapping[str, str] | None = None  # None: this process's


def run_rounds(
    contestants: Sequence[Contestant], num_rounds: int, memory_bytes: int = 0
) -> dict[str, tuple[Run, ...]]:
    """Run each contestant once per round. Returns {name: one run per round}.

    memory_bytes: how much memory a run fills, with the pages of what it writes.
    """
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    for round_number in range(num_rounds):
        # Every second round runs backwards, so that what one command leaves behind (free pages,
        # disk queues) helps or harms each of its neighbours equally.
        order = contestants if round_number % 2 == 0 else contestants[::-1]
        for contestant in order:
            contestant.prepare()
            touch_memory(memory_bytes)
            run = run_command(contestant.command, contestant.environment)
            runs[contestant.name].append(run)
            print(
                f"  round {round_number + 1}/{num_rounds}  {contestant.name}: {run.seconds:.3f} s",
                file=sys.stderr,
            )
    return {name: tuple(of_one) for name, of_one in runs.items()}


def median_ratio(runs: Sequence[Run], rival_runs: Sequence[Run]) -> float:
    """Return the median of the per-round time ratios, not the ratio of medians."""
    pairs = zip(runs, rival_runs, strict=True)
    return statistics.median(run.seconds / rival.seconds for run, rival in pairs)
