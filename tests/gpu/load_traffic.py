"""Requests that go on while adapters come and go, each answer told from the others by the reference."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.gpu.engine import Expected
from tests.gpu.server import Server

ADAPTERS = (*(f"v{number}" for number in range(7)), "fused0")
NUM_REQUESTS, TOKENS = 32, 24


@dataclass
class Names:
    """What each served name stands for. Thread-safe.

    generations: of each name, the adapters that it has stood for, in order; None while it has none.
    """

    generations: dict[str, list[str | None]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stands_for(self, name: str, adapter: str | None) -> None:
        with self._lock:
            self.generations.setdefault(name, []).append(adapter)

    def pick(self, choose: random.Random) -> tuple[str, int] | None:
        """A name that has an adapter, and how many it has had before."""
        with self._lock:
            ready = [name for name, had in self.generations.items() if had[-1] is not None]
            name = choose.choice(ready) if ready else None
            return None if name is None else (name, len(self.generations[name]) - 1)

    def since(self, name: str, generation: int) -> list[str | None]:
        """What it has stood for from then on."""
        with self._lock:
            return self.generations[name][generation:]


class Judge:
    """Which adapter an answer to one prompt is of, by the float32 reference."""

    def __init__(self, expected: Expected) -> None:
        self.prompts = expected.prompts
        self._known = {name: expected.of(name) for name in (*ADAPTERS, "base")}

    def nearest(self, prompt: int, got: Tensor) -> tuple[str, float]:
        """Its name, and the mean difference of the log-probabilities."""
        distances = {
            name: (got - known[prompt]).abs().mean().item() for name, known in self._known.items()
        }
        name = min(distances, key=lambda one: distances[one])
        return name, distances[name]

    def closest_pair(self) -> float:
        """How far the two adapters are apart whose answers differ least."""
        names = list(self._known)
        return min(
            (self._known[one] - self._known[other]).abs().mean(-1).min().item()
            for i, one in enumerate(names)
            for other in names[:i]
        )


class Traffic:
    """Requests that are in flight until `stop`, and what was wrong with their answers."""

    def __init__(self, server: Server, names: Names, judge: Judge) -> None:
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self.largest_error = 0.0
        self._server, self._names, self._judge = server, names, judge
        self._stops = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,)) for number in range(NUM_REQUESTS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, number: int) -> None:
        choose = random.Random(number)
        while not self._stops.is_set():
            picked = self._names.pick(choose)
            if picked is None:
                time.sleep(0.01)
                continue
            began = time.monotonic()
            try:
                outcome, problem = self._ask(*picked, choose.randrange(len(self._judge.prompts)))
            except Exception as err:  # noqa: BLE001 - the server is gone, or its answer is none
                outcome, problem = "no answer", f"{picked[0]}: {type(err).__name__}: {err}"
            with self._lock:
                self.answers[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                if problem and len(self.wrong) < 100:
                    self.wrong.append(problem)
            if outcome == "no answer":
                time.sleep(0.5)

    def _ask(self, name: str, generation: int, prompt: int) -> tuple[str, str | None]:
        tokens = self._judge.prompts[prompt].tolist()
        status, body = self._server.post(
            "/v1/completions",
            {
                "model": name, "prompt": tokens, "max_tokens": TOKENS, "temperature": 0,
                "prompt_logprobs": 1, "ignore_eos": True,
            },
        )  # fmt: skip
        possible = self._names.since(name, generation)
        if status == 404 and len(possible) > 1:
            return "unloaded before it came", None
        if status != 200:
            return f"status {status}", f"{name}: {status} {body[:300]}"
        answered = json.loads(body)["choices"][0]["prompt_logprobs"]
        got = torch.tensor(
            [answered[at][str(token)]["logprob"] for at, token in enumerate(tokens) if at > 0]
        )
        found, error = self._judge.nearest(prompt, got)
        if found not in possible:
            return "wrong", f"{name}: {found} (error {error:.3f}), not {possible}"
        with self._lock:
            self.largest_error = max(self.largest_error, error)
        return "right", None
