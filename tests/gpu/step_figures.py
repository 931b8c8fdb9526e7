"""What recorded steps (step_times.py) say: pure functions, from steps to figures and their ratios."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["ms a step", "µs a token"]
DECODE_UNIT: Unit = "ms a step"
PREFILL_UNIT: Unit = "µs a token"
# A step of ours may take so many times stock's.
MOST = 1.03
# vllm serve schedules up to 8,192 tokens a step on these GPUs (get_batch_defaults in engine/arg_utils.py).
# Of a burst of prompts, the first steps have the few that came first, and the last what is left.
FULL_STEP = 8192


@dataclass(frozen=True, slots=True)
class Step:
    """One call of execute_model. began_s: of a clock of the worker's."""

    num_tokens: int
    num_requests: int
    began_s: float
    gpu_ms: float


def decode_ms(engines: Sequence[Sequence[Step]], num_requests: int) -> list[float]:
    """From the begin of a step to the begin of the next, where both give each of so many requests a token.

    engines: the steps of each engine, which take them together. Of the first one's, those count that
    begin while all engines are at such steps.
    """
    full = (num_requests, num_requests)

    def is_full(step: Step) -> bool:
        return (step.num_tokens, step.num_requests) == full

    return [
        1000 * (after.began_s - step.began_s)
        for step, after in itertools.pairwise(_common(engines, is_full))
        if is_full(step) and is_full(after)
    ]


def prefill_us(engines: Sequence[Sequence[Step]], num_tokens: int) -> list[float]:
    """The GPU's time for a token, of each step of FULL_STEP tokens, or of num_tokens if that is less.

    engines: as above. num_tokens: of all prompts that an engine has at the same time.
    """
    full = min(FULL_STEP, num_tokens)

    def is_full(step: Step) -> bool:
        return step.num_tokens >= full

    return [
        1000 * step.gpu_ms / step.num_tokens for step in _common(engines, is_full) if is_full(step)
    ]


def _common(engines: Sequence[Sequence[Step]], is_full: Callable[[Step], bool]) -> Sequence[Step]:
    """The first engine's steps from the first to the last that are full in every engine."""
    times = [[step.began_s for step in steps if is_full(step)] for steps in engines]
    if not all(times):
        return []
    begin, end = max(map(min, times)), min(map(max, times))
    return [step for step in engines[0] if begin <= step.began_s <= end]


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Between which of them the middle half lies."""
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], ordered[-1 - quarter]


@dataclass
class Series:
    """Of one server and what it was asked. The first round is kept, but not counted."""

    unit: Unit
    rounds: list[list[float]] = field(default_factory=list)  # ms or µs of each step
    tokens_a_second: list[float] = field(default_factory=list)  # of each round

    def summary(self) -> dict[str, Any]:
        """The median and the lower quartile of all counted steps.

        spread: the middle half of them, as a part of the median.
        """
        counted = [value for values in self.rounds[1:] or self.rounds for value in values]
        median = statistics.median(counted) if counted else None
        low, high = middle_half(counted) if counted else (None, None)
        return {
            "unit": self.unit,
            "median": _rounded(median),
            "quartile": _rounded(low),
            "spread": _rounded((high - low) / median) if median and low and high else None,
            "steps": len(counted),
            "rounds": [
                _rounded(statistics.median(values) if values else None) for values in self.rounds
            ],
            "tokens_a_second": round(
                statistics.median(self.tokens_a_second[1:] or self.tokens_a_second), 1
            ),
        }


# Of each server: what it was asked -> what was found.
Found = dict[str, dict[str, Series]]


def summarise(found: Found, stock: str, own: str) -> dict[str, Any]:
    """What is written: figures of all servers, and our own as a part of stock's, of whatever both did.

    The parts are of lower quartiles: what else the host does only adds to a step, and does so for
    seconds at a time. as_expected: both have steps of everything, and no ratio is above MOST.
    """
    servers = {
        kind: {what: series.summary() for what, series in asked.items()}
        for kind, asked in found.items()
    }
    ratios = _ratios(servers.get(stock, {}), servers.get(own, {}))
    as_expected = bool(ratios) and all(
        ratio is not None and ratio <= MOST for ratio in ratios.values()
    )
    return {"servers": servers, "ratios": ratios, "as_expected": as_expected}


def _ratios(
    stock: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    return {
        what: round(own[what]["quartile"] / of["quartile"], 4)
        if own[what]["quartile"] and of["quartile"]
        else None
        for what, of in stock.items()
        if what in own
    }


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """A line for each ratio, and one for all."""
    lines = []
    for what, ratio in summary["ratios"].items():
        right = ratio is not None and ratio <= MOST
        shown = "no steps" if ratio is None else f"{ratio:.3f} times stock"
        lines.append(f"{'ok  ' if right else 'FAIL'} {what}: {shown}")
    return [*lines, f"as_expected: {summary['as_expected']} (at most {MOST} times stock)"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
