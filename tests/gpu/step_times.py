"""A vLLM worker extension: what each step of the model runner was, and how long it took.

For tests.gpu.throughput, which calls it through /collective_rpc (VLLM_SERVER_DEV_MODE=1). It imports
nothing of lorashard, because stock servers have it too.
"""

# As read in vLLM 0.24.0, 0.30.0 and 0.33.0:
# - Every real step is `self.model_runner.execute_model(scheduler_output, intermediate_tensors)` in
#   v1/worker/gpu_worker.py, for either model runner, so that an attribute of the instance is called.
#   It launches the forward pass; sampling comes in another call. `execute_dummy_batch` calls
#   `_dummy_run`, and the newer runner's (v1/worker/gpu/model_runner.py) calls
#   `self.execute_model(..., dummy_run=True)`; the older one's calls the model.
#   `_dummy_run` is called by the worker's `execute_dummy_batch` in either case.
# - A step without tokens, which only takes finished requests away, has total_num_scheduled_tokens = 0.
# - /collective_rpc of a server with data-parallel engines (DPLBAsyncMPClient.call_utility_async in
#   v1/engine/core_client.py) calls all engines, waits for all, and answers with the first engine's
#   results alone. So the workers write theirs to files.

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Event(Protocol):
    """What is needed of a torch.cuda.Event."""

    def record(self) -> object: ...

    def synchronize(self) -> object: ...

    def elapsed_time(self, end: Any) -> float: ...


def _cuda_event() -> Event:
    import torch

    event: Event = torch.cuda.Event(enable_timing=True)
    return event


class RecordedCalls:
    """Stands for `execute_model` of a model runner; records its steps while it is asked to."""

    def __init__(self, execute_model: Callable[..., Any], event: Callable[[], Event]) -> None:
        self._execute_model, self._event = execute_model, event
        self.last_s = time.perf_counter()  # when the last step of any kind began
        self._steps: list[tuple[int, int, float, Event, Event]] | None = None

    def begin(self) -> None:
        """Forget what was recorded, and record."""
        self._steps = []

    def end(self) -> list[list[float]]:
        """Record no more. Of each step: tokens, requests, when it began (s), and the GPU's time (ms)."""
        steps, self._steps = self._steps or [], None
        if steps:
            # Not the whole device: an engine may already wait for others in a dummy batch.
            steps[-1][-1].synchronize()
        return [
            [tokens, requests, began_s, begin.elapsed_time(end)]
            for tokens, requests, began_s, begin, end in steps
        ]

    def __call__(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.last_s = time.perf_counter()
        tokens = scheduler_output.total_num_scheduled_tokens
        if self._steps is None or kwargs.get("dummy_run") or tokens == 0:
            return self._execute_model(scheduler_output, *args, **kwargs)
        requests = len(scheduler_output.num_scheduled_tokens)
        begin, end = self._event(), self._event()
        began_s = time.perf_counter()
        begin.record()
        output = self._execute_model(scheduler_output, *args, **kwargs)
        end.record()
        self._steps.append((tokens, requests, began_s, begin, end))
        return output


def _noting(recorded: RecordedCalls, dummy_run: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        recorded.last_s = time.perf_counter()
        return dummy_run(*args, **kwargs)

    return noted


class StepTimes:
    """Methods for the workers, called on all ranks at once."""

    model_runner: Any
    parallel_config: Any
    rank: int

    def record_steps(self) -> None:
        """From now on; what was recorded before is forgotten."""
        runner = self.model_runner
        if not isinstance(runner.execute_model, RecordedCalls):
            recorded = runner.execute_model = RecordedCalls(runner.execute_model, _cuda_event)
            runner._dummy_run = _noting(recorded, runner._dummy_run)
        runner.execute_model.begin()

    def seconds_at_rest(self) -> float:
        """Since the last step began, with tokens or without."""
        return time.perf_counter() - self.model_runner.execute_model.last_s  # type: ignore[no-any-return]

    def write_recorded_steps(self, folder: str) -> None:
        """Into a file of the folder, named after engine and rank.

        Of each step since then: tokens, requests, when it began (s), and the GPU's time (ms).
        """
        name = f"{self.parallel_config.data_parallel_rank}-{self.rank}.json"
        steps = self.model_runner.execute_model.end()
        Path(folder, name).write_text(json.dumps(steps))
