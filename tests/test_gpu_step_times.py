"""Steps of vLLM's workers: which are recorded, the figures that come out of them, and their tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.dp_report import dp_part
from tests.gpu.speed_report import speed_part
from tests.gpu.step_figures import (
    DECODE_UNIT,
    PREFILL_UNIT,
    Series,
    Step,
    decode_ms,
    prefill_us,
    summarise,
    verdicts,
)
from tests.gpu.step_times import RecordedCalls, StepTimes
from tests.gpu.throughput import REST_S, wait_until_at_rest


@dataclass
class Clock:
    """A stream of a GPU: a step takes 2 ms for a token."""

    ms: float = 0.0

    def event(self) -> ClockEvent:
        return ClockEvent(self)


@dataclass
class ClockEvent:
    clock: Clock
    at: float | None = None
    waited: bool = False

    def record(self) -> None:
        self.at = self.clock.ms

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: ClockEvent) -> float:
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


@dataclass
class Runner:
    """A model runner; its own dummy runs call `execute_model` as the newer of vLLM's does."""

    clock: Clock
    calls: list[Any] = field(default_factory=list)

    def execute_model(
        self, output: Any, tensors: Any = None, dummy_run: bool = False
    ) -> tuple[Any, Any]:
        self.calls.append((output, tensors, dummy_run))
        self.clock.ms += 2 * output.total_num_scheduled_tokens
        return output, tensors

    def _dummy_run(self) -> None:
        self.execute_model(scheduled(5), dummy_run=True)


def scheduled(*tokens: int) -> Any:
    """What a scheduler gives to a worker: tokens of each request."""
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(tokens),
        num_scheduled_tokens={str(number): of_one for number, of_one in enumerate(tokens)},
    )


def test_steps_with_tokens_are_recorded_while_asked_to() -> None:
    clock = Clock()
    runner = Runner(clock)
    recorded = RecordedCalls(runner.execute_model, clock.event)
    runner.execute_model = recorded  # type: ignore[method-assign]
    runner.execute_model(scheduled(9))
    recorded.begin()
    runner.execute_model(scheduled(7))
    recorded.begin()
    assert runner.execute_model(prompts := scheduled(30, 2), "tensors") == (prompts, "tensors")
    runner._dummy_run()
    runner.execute_model(scheduled())
    runner.execute_model(scheduled(1, 1, 1))
    steps = recorded.end()
    runner.execute_model(scheduled(4))
    assert [[tokens, requests, ms] for tokens, requests, _, ms in steps] == [[32, 2, 64], [3, 3, 6]]
    assert steps[0][2] < steps[1][2]
    assert recorded.end() == []
    assert len(runner.calls) == 7


def test_a_worker_wraps_its_runner_once(tmp_path: Path) -> None:
    worker = StepTimes()
    worker.model_runner = Runner(Clock())
    worker.parallel_config, worker.rank = SimpleNamespace(data_parallel_rank=1), 0
    worker.record_steps()
    wrapped = worker.model_runner.execute_model
    worker.record_steps()
    assert worker.seconds_at_rest() < 10
    wrapped.last_s -= 10
    assert worker.seconds_at_rest() > 10
    worker.model_runner._dummy_run()
    assert worker.seconds_at_rest() < 10
    assert worker.model_runner.execute_model is wrapped
    worker.write_recorded_steps(str(tmp_path))
    assert json.loads((tmp_path / "1-0.json").read_text()) == []


def decoding(num_requests: int, began_s: float) -> Step:
    return Step(num_requests, num_requests, began_s, 0.5)


def test_decode_is_the_time_between_two_steps_of_all_requests() -> None:
    steps = [
        Step(32, 1, 0.0, 9.0),
        decoding(2, 1.0),
        decoding(2, 1.004),
        Step(33, 2, 1.009, 9.0),  # two requests, but one is a prompt
        decoding(2, 2.0),
        decoding(2, 2.006),
        decoding(1, 3.0),
        decoding(1, 3.5),
    ]
    assert decode_ms([steps], 2) == pytest.approx([4.0, 6.0])
    assert decode_ms([steps], 1) == pytest.approx([500.0])
    assert decode_ms([steps], 3) == []


def test_prefill_is_the_gpu_time_for_a_token_of_full_steps() -> None:
    steps = [Step(960, 1, 0.0, 96.0), Step(8192, 9, 0.1, 81.92), Step(8000, 9, 0.2, 40.0)]
    assert prefill_us([steps], 30_720) == pytest.approx([10.0])
    assert prefill_us([steps], 960) == pytest.approx([100.0, 10.0, 5.0])


def test_steps_count_while_every_engine_takes_full_ones() -> None:
    first = [decoding(2, at) for at in (1.0, 1.004, 1.009, 1.015)]
    second = [decoding(1, 1.0), decoding(2, 1.004), decoding(2, 1.012), decoding(1, 1.015)]
    assert decode_ms([first, second], 2) == pytest.approx([5.0])
    assert decode_ms([first, [decoding(1, 1.0)]], 2) == []
    large = [Step(8192, 9, at, 10 * at) for at in (8.192, 16.384, 24.576)]
    assert prefill_us([large, large[1:]], 61_440) == pytest.approx([20.0, 30.0])


def series(*rounds: list[float]) -> Series:
    return Series(DECODE_UNIT, list(rounds), [10.0 * number for number in range(len(rounds))])


def test_the_first_round_is_not_counted() -> None:
    summary = series([90.0, 91.0], [1.0, 2.0], [3.0, 6.0, 4.0]).summary()
    assert (summary["median"], summary["quartile"], summary["steps"]) == (3.0, 2.0, 5)
    assert summary["spread"] == pytest.approx(2 / 3, abs=1e-4)
    assert summary["rounds"] == [90.5, 1.5, 4.0]
    assert summary["tokens_a_second"] == 15.0


@pytest.mark.parametrize(
    ("stock", "own", "ratio", "as_expected"),
    [([2.0], [2.06], 1.03, True), ([2.0], [2.08], 1.04, False), ([2.0], [], None, False)],
)
def test_ours_is_compared_with_stock_of_the_same_mix(
    stock: list[float], own: list[float], ratio: float | None, as_expected: bool
) -> None:
    found = {
        "dp-stock": {"decode, base": series([1.0], stock)},
        "dp": {"decode, base": series([1.0], own), "decode, two adapters": series([1.0], [9.0])},
    }
    summary = summarise(found, "dp-stock", "dp")
    assert summary["ratios"] == {"decode, base": ratio}
    assert summary["as_expected"] is as_expected
    assert [line[:4] for line in verdicts(summary)] == ["ok  " if as_expected else "FAIL", "as_e"]


def test_nothing_to_compare_is_not_as_expected() -> None:
    assert not summarise({"dp": {"decode": series([1.0])}}, "dp-stock", "dp")["as_expected"]


def test_tables_have_stock_beside_ours_and_the_ratio() -> None:
    prefill = Series(PREFILL_UNIT, [[1.0], [20.0]], [1.0, 1.0])
    found = {
        "stock": {"decode": series([1.0], [2.0, 2.0]), "prefill": prefill},
        "plugin": {"decode": series([1.0], [2.5, 2.5]), "prefill": series([1.0], [])},
    }
    speeds = {"gpu": "H100", **summarise(found, "stock", "plugin")}
    table = speed_part([{"release": "0.33.0", "tp_speed": speeds}])
    assert (
        "| 0.33.0 | decode | 2.000 ms a step (2.000) | 2.500 ms a step (2.500) | 1.250 |" in table
    )
    assert "| 0.33.0 | prefill | 20.000 µs a token (20.000) | – | – |" in table
    own = {"gpu": "H200", **summarise({"dp": found["plugin"]}, "dp-stock", "dp")}
    part = dp_part([{"release": "0.33.0", "dp_speed": own}])
    assert "H200" in part
    assert "| 0.33.0 | decode | – | 2.500 ms a step (2.500) | – | – |" in part


class Resting:
    """A server's endpoint as vLLM 0.33.0 answers there (entrypoints/serve/dev/rpc/api_router.py)."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def post(self, path: str, document: dict[str, Any]) -> tuple[int, str]:
        assert (path, document["method"]) == ("/collective_rpc", "seconds_at_rest")
        return 200, json.dumps({"results": [str(self.seconds.pop(0)), "9.0"]})


def test_a_server_is_waited_for_until_it_rests() -> None:
    server = Resting(0.1, 0.01, REST_S, 5.0)
    wait_until_at_rest(server)
    assert server.seconds == [5.0]
