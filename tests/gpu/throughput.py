"""The steps of a server while it has some requests at the same time, and its tokens a second."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu import workers
from tests.gpu.load_adapters import VOCABULARY
from tests.gpu.server import Server
from tests.gpu.step_figures import (
    DECODE_UNIT,
    PREFILL_UNIT,
    Series,
    Step,
    Unit,
    decode_ms,
    prefill_us,
    verdicts,
)  # fmt: skip
from tests.gpu.workers import on_workers

# For the servers: methods of workers that record steps.
EXTENSION = ("--worker-extension-cls", "tests.gpu.step_times.StepTimes")


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of a prompt, and tokens that are generated for it; if that is one, prompts are counted."""

    name: str
    prompt: int
    generated: int

    @property
    def unit(self) -> Unit:
        return DECODE_UNIT if self.generated > 1 else PREFILL_UNIT


# A server is at rest once it has taken no step for so long; idle engines' steps are shorter.
REST_S, REST_LIMIT_S = 0.5, 30.0
DECODE = Workload("decode", 32, 64)
PREFILL = Workload("prefill", 960, 1)


def measure(
    server: Server,
    names: Sequence[str],
    workload: Workload,
    series: Series,
    *,
    num_engines: int = 1,
    times: int = 1,
) -> None:
    """One more round of `series`: a request for each of `names`, all at once, and that so many times.

    num_engines: the requests go to so many data-parallel engines in turn. The first round, which is not
    counted, is asked once more before: the kernels that these requests need are compiled then.

    Returns when the server is at rest, and disturbs no other: data-parallel engines take up to 32 more
    steps without tokens, and in each of them stock vLLM puts dummy adapters into its slots.
    """
    if not series.rounds:
        _ask(server, names, workload, num_engines)
    on_workers(server, "record_steps")
    began = time.monotonic()
    for _ in range(times):
        _ask(server, names, workload, num_engines)
    seconds = time.monotonic() - began
    wait_until_at_rest(server)
    steps = recorded_steps(server, num_engines)
    of_an_engine = len(names) // num_engines
    if workload.generated > 1:
        series.rounds.append(decode_ms(steps, of_an_engine))
        tokens = workload.generated
    else:
        series.rounds.append(prefill_us(steps, of_an_engine * workload.prompt))
        tokens = workload.prompt
    series.tokens_a_second.append(times * len(names) * tokens / seconds)


def wait_until_at_rest(server: workers.Server) -> None:
    """Until no worker of the first engine has begun a step for REST_S. Raises RuntimeError."""
    ends = time.monotonic() + REST_LIMIT_S
    while float(on_workers(server, "seconds_at_rest")[0]) < REST_S:
        if time.monotonic() > ends:
            raise RuntimeError(
                f"the server goes on taking steps, {REST_LIMIT_S} s after all answers"
            )
        time.sleep(0.1)


def recorded_steps(server: Server, num_engines: int = 1) -> list[list[Step]]:
    """Of each engine's first rank, since `record_steps`."""
    with tempfile.TemporaryDirectory() as folder:
        on_workers(server, "write_recorded_steps", folder)
        files = [min(Path(folder).glob(f"{engine}-*.json")) for engine in range(num_engines)]
        return [
            [
                Step(int(tokens), int(requests), began_s, gpu_ms)
                for tokens, requests, began_s, gpu_ms in json.loads(file.read_text())
            ]
            for file in files
        ]


def _ask(server: Server, names: Sequence[str], workload: Workload, num_engines: int) -> None:
    """A request for each of `names`, the adapters or the base model, until all are answered."""
    chance = random.Random(0)
    prompts = [[chance.randrange(5, VOCABULARY - 5) for _ in range(workload.prompt)] for _ in names]

    def one(number: int) -> None:
        body = {
            "model": names[number], "prompt": prompts[number], "max_tokens": workload.generated,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        engine = number % num_engines if num_engines > 1 else None
        status, text = server.post("/v1/completions", body, engine)
        if status != 200:
            raise RuntimeError(f"{names[number]}: {status} {text[:300]}")
        generated = json.loads(text)["usage"]["completion_tokens"]
        if generated != workload.generated:
            raise RuntimeError(f"{names[number]}: {generated} tokens instead of those asked for")

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, range(len(names))))


def print_speeds(speeds: Mapping[str, Any]) -> None:
    """Of step_figures.summarise: lower quartiles (medians) of each server, then the ratios."""
    for kind, asked in speeds["servers"].items():
        for what, of in asked.items():
            print(
                f"{kind}, {what}: {of['quartile']} ({of['median']}) {of['unit']}, {of['steps']} steps",
                flush=True,
            )
    print("\n".join(verdicts(speeds)), flush=True)
