"""Tokens a second of requests that a server has at the same time, and what several rounds say of them."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.gpu.load_adapters import VOCABULARY
from tests.gpu.server import Server

# Of each server: what it was asked -> a figure for each round.
Figures = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of a prompt, and tokens that are generated for it; if that is one, prompts are counted."""

    name: str
    prompt: int
    generated: int


DECODE = Workload("decode", 32, 128)
PREFILL = Workload("prefill", 960, 1)


def tokens_a_second(
    server: Server, names: Sequence[str], workload: Workload, *, num_engines: int = 1
) -> float:
    """Of all requests together, one for each of `names`: the adapters, or the base model.

    num_engines: the requests go to so many data-parallel engines in turn.
    """
    chance = random.Random(0)
    prompts = [[chance.randrange(5, VOCABULARY - 5) for _ in range(workload.prompt)] for _ in names]

    def one(number: int) -> int:
        body = {
            "model": names[number], "prompt": prompts[number], "max_tokens": workload.generated,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        engine = number % num_engines if num_engines > 1 else None
        status, text = server.post("/v1/completions", body, engine)
        if status != 200:
            raise RuntimeError(f"{names[number]}: {status} {text[:300]}")
        return int(json.loads(text)["usage"]["completion_tokens"])

    began = time.monotonic()
    with ThreadPoolExecutor(len(names)) as pool:
        generated = sum(pool.map(one, range(len(names))))
    seconds = time.monotonic() - began
    return (generated if workload.generated > 1 else len(names) * workload.prompt) / seconds


def summarise(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """For each server and what it was asked: the median of the rounds but the first, and all figures.

    spread: the middle half of the rounds, as a part of the median.
    """
    return {
        kind: {what: _summary(found) for what, found in asked.items()}
        for kind, asked in figures.items()
    }


def _summary(found: Sequence[float]) -> dict[str, Any]:
    counted = sorted(found[1:] or found)
    median = statistics.median(counted)
    quarter = len(counted) // 4
    spread = (counted[-1 - quarter] - counted[quarter]) / median
    return {"tokens_a_second": median, "spread": round(spread, 4), "all": list(found)}
