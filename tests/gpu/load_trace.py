"""What a step waits for while an adapter is loaded: both ranks' CUDA calls and GPU work, as torch's profiler has them.

    python -m tests.gpu.load_trace --work DIR --out FILE [--eager]

A server with the plugin as in `publishing`, with 32 requests that decode. Of one load, after some that are
not looked at: for each rank the longest time between the begins of two steps, and what happened in it. The
profiler makes steps longer by some tenths. FILE has a summary; the traces lie beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.gpu.step_times import StepTimes

STEP = "a step"
_CALLS = {"cuda_runtime", "cuda_driver"}
_OF_THREADS = _CALLS | {"cpu_op"}  # marks such as that of a step are no work
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_MOST_NAMES = 8
NUM_LOADS, QUIET_S = 3, 1.0
Event = Mapping[str, Any]


class Traced(StepTimes):
    """Methods for the workers."""

    def begin_trace(self) -> None:
        """Profile from now on, with a mark for each step."""
        import torch

        runner = self.model_runner
        execute_model = self._untraced = runner.execute_model

        def marked(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(STEP):
                return execute_model(*args, **kwargs)

        runner.execute_model = marked
        kinds = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
        self._profile.start()

    def end_trace(self, folder: str) -> None:
        """Write it into a file of the folder, named after the rank."""
        self._profile.stop()
        self.model_runner.execute_model = self._untraced
        self._profile.export_chrome_trace(str(Path(folder, f"trace-{self.rank}.json")))


def describe(events: Iterable[Event]) -> dict[str, Any]:
    """Of the longest time between the begins of two steps, what happened in it. events: of a trace.

    All in ms. main: the thread of the steps; "in no call" is Python, or waiting for its lock.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    steps = sorted(
        (event["ts"], event["tid"])
        for event in timed
        if event["name"] == STEP and event.get("cat") == "user_annotation"
    )
    (begin, main), (end, _) = max(pairwise(steps), key=lambda pair: pair[1][0] - pair[0][0])
    within = [event for event in timed if _clipped(event, begin, end) > 0]
    calls = [event for event in within if event.get("cat") in _CALLS]
    inside = [event for event in within if event["tid"] == main and event.get("cat") in _OF_THREADS]
    return {
        "steps": len(steps),
        "usual_ms": _ms(
            statistics.median(after - before for (before, _), (after, _) in pairwise(steps))
        ),
        "longest_ms": _ms(end - begin),
        "main_in_no_call_ms": _ms(end - begin - _covered(inside, begin, end)),
        "main": _by_name([event for event in calls if event["tid"] == main], begin, end),
        "others": _by_name([event for event in calls if event["tid"] != main], begin, end),
        "gpu": _by_stream(within, begin, end),
        "longest_wait_on_gpu": _longest_wait(timed, main, begin, end),
    }


def _by_name(events: Sequence[Event], begin: float, end: float) -> dict[str, Any]:
    """How often, how long in all, and the longest; of those that took longest."""
    total: Counter[str] = Counter()
    for event in events:
        total[event["name"]] += _clipped(event, begin, end)
    named = {
        name: [e for e in events if e["name"] == name] for name, _ in total.most_common(_MOST_NAMES)
    }
    return {
        name: {
            "count": len(of_name),
            "ms": _ms(total[name]),
            "longest_ms": _ms(max(event["dur"] for event in of_name)),
        }
        for name, of_name in named.items()
    }


def _by_stream(events: Sequence[Event], begin: float, end: float) -> dict[str, Any]:
    """Busy ms of kernels and copies by stream, and what was copied to the device."""
    found: dict[str, Any] = {}
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        stream = found.setdefault(str(event.get("args", {}).get("stream")), Counter())
        stream[f"{event['cat']}_ms"] += _clipped(event, begin, end) / 1e3
        if "HtoD" in event["name"]:
            stream["to_device"] += 1
            stream["to_device_mb"] += event["args"].get("bytes", 0) / 1e6
    return {
        name: {what: round(value, 3) for what, value in stream.items()}
        for name, stream in found.items()
    }


def _longest_wait(events: Sequence[Event], main: Any, begin: float, end: float) -> dict[str, Any]:
    """Of what the steps' thread gave to the GPU: from the call's end to when it began there."""
    given = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _CALLS
        and event["tid"] == main
        and "correlation" in event.get("args", {})
    }
    waits = [
        (event["ts"] - call["ts"] - call["dur"], event["name"])
        for event in events
        if event.get("cat") in _ON_GPU
        and (call := given.get(event.get("args", {}).get("correlation"))) is not None
        and begin <= call["ts"] < end
    ]
    copies = [wait for wait in waits if "Memcpy" in wait[1]]
    return {
        kind: {"ms": _ms(max(found)[0]), "what": max(found)[1][:80]}
        for kind, found in (("any", waits), ("copy", copies))
        if found
    }


def _covered(events: Sequence[Event], begin: float, end: float) -> float:
    """The time in which at least one of them goes on."""
    total, until = 0.0, begin
    for event in sorted(events, key=lambda event: float(event["ts"])):
        first, last = max(event["ts"], until), min(event["ts"] + event["dur"], end)
        if last > first:
            total += last - first
            until = last
    return total


def _clipped(event: Event, begin: float, end: float) -> float:
    return min(float(event["ts"] + event["dur"]), end) - max(float(event["ts"]), begin)


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 3)


def _main() -> None:
    from tests.bench.trainer_ranks import Trainer
    from tests.gpu.checkpoint import save_tokenizer
    from tests.gpu.load_adapters import NUM_EXPERTS, NUM_LAYERS, VOCABULARY, write_model_config
    from tests.gpu.publishing import DEVICES, load, serve_command, unload
    from tests.gpu.server import Server
    from tests.gpu.token_gaps import Decoding
    from tests.gpu.workers import on_workers

    parser = argparse.ArgumentParser(prog="python -m tests.gpu.load_trace")
    parser.add_argument("--work", type=Path, required=True, help="in /dev/shm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    args = parser.parse_args()
    work = args.work.absolute() / "load-trace"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_model_config(work, NUM_EXPERTS)
    save_tokenizer(work / "model", VOCABULARY)
    extension = ("--worker-extension-cls", "tests.gpu.load_trace.Traced")
    command = serve_command(work / "model", graphs=not args.eager, extension=extension)
    server = Server(command, args.out.absolute().with_suffix(".server.log"))
    try:
        paths = [work / f"a{number}" for number in range(3)]
        with closing(Trainer(2, NUM_LAYERS - 1, DEVICES)) as trainer:
            for path in paths:
                trainer.run("write", path, ep_size=2)
                trainer.run("train")
        server.wait()
        load(server, paths[0])
        decoding = Decoding(server.url, paths[0].name)
        try:
            decoding.wait_until_all_run()
            for number in range(NUM_LOADS):
                is_last = number == NUM_LOADS - 1
                time.sleep(QUIET_S)
                if is_last:
                    on_workers(server, "begin_trace")
                    time.sleep(QUIET_S / 4)
                began = time.perf_counter()
                load(server, paths[1 + number % 2])
                load_s = time.perf_counter() - began
                if is_last:
                    on_workers(server, "end_trace", str(args.out.parent.absolute()))
                unload(server, paths[1 + number % 2])
        finally:
            decoding.stop()
    finally:
        server.end()
    document: dict[str, Any] = {"load_s": round(load_s, 4)}
    for file in sorted(args.out.parent.glob("trace-*.json")):
        document[file.stem] = describe(json.loads(file.read_text())["traceEvents"])
    args.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))


if __name__ == "__main__":
    _main()
