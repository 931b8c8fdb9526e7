"""When the tokens of running requests come: the gaps between them, in general and while something happens."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

# So long that no request ends by itself.
NUM_REQUESTS, PROMPT_TOKENS, MAX_LEN = 32, 32, 8192
# Times of time.perf_counter(), which is one clock for all processes of a host.
Pair = tuple[float, float]


class Decoding:
    """Requests that go on until they are stopped, and when each of their tokens came."""

    def __init__(self, url: str, model: str) -> None:
        self.times: list[list[float]] = [[] for _ in range(NUM_REQUESTS)]
        self._stops = threading.Event()
        self._threads = [
            threading.Thread(target=self._decode, args=(url, model, number))
            for number in range(NUM_REQUESTS)
        ]
        for thread in self._threads:
            thread.start()

    def _decode(self, url: str, model: str, number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        body = {
            "model": model, "prompt": [3 + number, *range(10, 9 + PROMPT_TOKENS)], "stream": True,
            "max_tokens": MAX_LEN - PROMPT_TOKENS - 1, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        while not self._stops.is_set() and (line := answer.readline()):
            if line.startswith(b"data: {"):
                self.times[number].append(time.perf_counter())
        connection.close()

    def wait_until_all_run(self) -> None:
        ends = time.monotonic() + 60
        while any(len(times) < 10 for times in self.times):
            if time.monotonic() > ends:
                raise RuntimeError(f"tokens: {[len(times) for times in self.times]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join()


def pairs_within(series: Iterable[Sequence[float]], begin: float, end: float) -> list[Pair]:
    """Each time with the next of its series, if one of them at least lies within begin and end."""
    return [
        (before, after)
        for times in series
        for before, after in pairwise(times)
        if after > begin and before < end
    ]


def gaps_at(series: Sequence[Sequence[float]], windows: Sequence[Pair]) -> dict[str, Any]:
    """In ms: what is ordinary, from the second before each window, and the longest of each window.

    series: of one request or more, when its tokens came; or of a worker, when its steps began.
    """
    ordinary = [
        after - before
        for begin, _ in windows
        for before, after in pairs_within(series, begin - 1.0, begin)
        if after <= begin
    ]
    longest = [
        max(pairs_within(series, *window), key=lambda pair: pair[1] - pair[0]) for window in windows
    ]
    step = statistics.median(ordinary)
    of_load = [after - before for before, after in longest]
    return {
        "step_ms": round(1e3 * step, 2),
        "longest_ordinary_gap_ms": round(1e3 * max(ordinary), 2),
        "longest_gap_at_each_load_ms": [round(1e3 * gap, 2) for gap in of_load],
        "longest_gap_from_and_to_s": [
            [round(time - begin, 4) for time in pair]
            for pair, (begin, _) in zip(longest, windows, strict=True)
        ],
        "in_steps": round(statistics.median(of_load) / step, 1),
    }
