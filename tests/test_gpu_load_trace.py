"""What a trace says of the longest time between two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu.load_trace import STEP, describe

MAIN, OTHER = 1, 2
MS = 1000.0  # of a trace's microseconds


def event(
    cat: str, name: str, begin: float, ms: float, tid: int = MAIN, **args: object
) -> dict[str, object]:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": begin * MS, "dur": ms * MS, "tid": tid, "args": args,
    }  # fmt: skip


def test_the_longest_time_and_what_happened_in_it() -> None:
    events = [event("user_annotation", STEP, begin, 3) for begin in (0, 5, 10, 40, 45)]
    events += [
        event("cuda_runtime", "cudaLaunchKernel", 11, 1, correlation=7),
        event("cuda_runtime", "cudaLaunchKernel", 12, 4, correlation=8),
        event("cuda_runtime", "cudaMemcpyAsync", 14, 1, correlation=9),  # while the one before goes on
        event("cuda_runtime", "cudaMemcpyAsync", 2, 1),  # in another step
        event("cuda_runtime", "cudaHostRegister", 5, 20, OTHER),
        event("kernel", "a kernel", 20, 2, 7, stream=7, correlation=8),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 35, 8, 7, stream=7, correlation=9, bytes=3e6),
        event("kernel", "of others", 1, 2, 9, stream=9),
        {"ph": "M", "name": "thread_name"},
    ]  # fmt: skip
    found = describe(events)
    assert (found["steps"], found["usual_ms"], found["longest_ms"]) == (5, 5.0, 30.0)
    assert found["main_in_no_call_ms"] == 25.0  # busy from 11 to 16
    assert found["main"]["cudaLaunchKernel"] == {"count": 2, "ms": 5.0, "longest_ms": 4.0}
    assert found["main"]["cudaMemcpyAsync"]["count"] == 1
    assert found["others"] == {"cudaHostRegister": {"count": 1, "ms": 15.0, "longest_ms": 20.0}}
    assert found["gpu"] == {
        "7": {"kernel_ms": 2.0, "gpu_memcpy_ms": 5.0, "to_device": 1, "to_device_mb": 3.0}
    }
    assert found["longest_wait_on_gpu"]["copy"]["ms"] == 20.0
    assert found["longest_wait_on_gpu"]["any"]["what"].startswith("Memcpy")


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_torchs_has_the_marks(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for size in (10, 1000, 10):
            with torch.profiler.record_function(STEP):
                torch.ones(size, size) @ torch.ones(size, size)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    found = describe(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert found["steps"] == 3
    assert 0 < found["usual_ms"] <= found["longest_ms"]
    assert found["main_in_no_call_ms"] < found["longest_ms"]
