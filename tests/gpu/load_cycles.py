"""Loads, unloads and swaps on a live server, and adapters that it must refuse."""

from __future__ import annotations

import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.storage.syscalls import exchange
from tests.gpu.load_traffic import ADAPTERS, Judge, Names
from tests.gpu.server import RANK_FILES, Server, damage
from tests.gpu.workers import on_workers

NUM_NAMES = 4
BAD_EVERY = 4  # cycles
MOST_S = 10.0  # until a bad adapter is refused


@dataclass(frozen=True)
class Bad:
    """refused: what the answer must say; None where it may be loaded, and then answers right."""

    kind: str
    refused: str | None


BAD = (
    Bad("missing", re.escape(RANK_FILES[1])),
    Bad("truncated", re.escape(RANK_FILES[1])),
    Bad("another model", "expert|model"),
    Bad("another EP size", None),
    Bad("replaced while being read", None),
    Bad("failing disk", "Input/output error"),
)


class Cycles:
    """Loads, unloads and swaps, one after the other."""

    def __init__(
        self, server: Server, names: Names, judge: Judge, models: Path, folder: Path
    ) -> None:
        self._server, self._names, self._judge = server, names, judge
        self._models, self._folder = models, folder
        self._choose = random.Random(0)
        self.problems: list[str] = []
        self.bad: dict[str, dict[str, Any]] = {
            one.kind: {"tried": 0, "refused": 0, "loaded": 0, "slowest_s": 0.0} for one in BAD
        }
        self.load_s: list[float] = []

    def shards(self, adapter: str) -> Path:
        return self._models / f"{adapter}.shards"

    def _load(self, name: str, path: Path) -> tuple[int, str, float]:
        began = time.monotonic()
        status, body = self._server.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}
        )
        return status, body, time.monotonic() - began

    def _unload(self, name: str) -> None:
        status, body = self._server.post("/v1/unload_lora_adapter", {"lora_name": name})
        if status != 200:
            self.problems.append(f"unload {name}: {status} {body[:300]}")

    def run(self, cycle: int) -> None:
        """Replace what one name stands for; the name is used again, or a new one takes its place."""
        name = f"s{cycle % NUM_NAMES}"
        if self._names.generations.get(name):
            self._names.stands_for(name, None)
            self._unload(name)
        adapter = self._choose.choice(ADAPTERS)
        status, body, seconds = self._load(name, self.shards(adapter))
        if status == 200:
            self.load_s.append(seconds)
            self._names.stands_for(name, adapter)
        else:
            self.problems.append(f"cycle {cycle}: {adapter} was not loaded: {status} {body[:300]}")
        if cycle % BAD_EVERY == 0:
            self._try_bad(BAD[cycle // BAD_EVERY % len(BAD)], cycle)

    def _try_bad(self, bad: Bad, cycle: int) -> None:
        path = self._folder / f"bad-{cycle}"
        right, before, after = self._make(bad.kind, path)
        before()
        try:
            status, body, seconds = self._load(path.name, path)
        finally:
            after()
        row = self.bad[bad.kind]
        row["tried"] += 1
        row["slowest_s"] = max(row["slowest_s"], round(seconds, 3))
        if status == 200:
            row["loaded"] += 1
            if bad.refused is not None:
                self.problems.append(f"cycle {cycle}: {bad.kind}: it was loaded")
            self._check_loaded(bad.kind, path.name, right)
            self._unload(path.name)
        else:
            row["refused"] += 1
            row["said"] = body[:400]
            if seconds > MOST_S:
                self.problems.append(f"cycle {cycle}: {bad.kind}: refused after {seconds:.1f} s")
            if not re.search(bad.refused or r"\S", body):
                self.problems.append(f"cycle {cycle}: {bad.kind}: {status} {body[:300]}")
        shutil.rmtree(path, ignore_errors=True)

    def _check_loaded(self, kind: str, name: str, right: tuple[str, ...]) -> None:
        """Each prompt is answered by one and the same of the adapters that it may be."""
        got = self._server.log_probs(name, self._judge.prompts)
        found = {self._judge.nearest(prompt, row)[0] for prompt, row in enumerate(got)}
        if len(found) != 1 or not found <= set(right):
            self.problems.append(f"{kind}: it answers as {sorted(found)}, not as one of {right}")

    def _make(
        self, kind: str, path: Path
    ) -> tuple[tuple[str, ...], Callable[[], Any], Callable[[], Any]]:
        """The bad adapter at `path`: what it may answer as, and what to do before and after a load."""
        first, second = self._choose.sample(ADAPTERS[:7], 2)

        def nothing() -> None:
            pass

        if kind in ("missing", "truncated"):
            damage(self.shards(first), path, kind)
            return (), nothing, nothing
        if kind == "another model":
            shutil.copytree(self._folder / "another-model", path)
            return (), nothing, nothing
        if kind == "another EP size":
            shutil.copytree(self._models / f"{ADAPTERS[0]}.shards-ep4", path)
            return (ADAPTERS[0],), nothing, nothing
        shutil.copytree(self.shards(first), path)
        if kind == "failing disk":
            return (
                (),
                lambda: on_workers(self._server, "break_disk", 1, str(path)),
                lambda: on_workers(self._server, "mend_disk"),
            )
        other = path.with_name(f"{path.name}-other")
        shutil.copytree(self.shards(second), other)
        swapping = Swapping(path, other)
        return (first, second), swapping.start, swapping.end


class Swapping:
    """Two directories change places again and again."""

    def __init__(self, one: Path, other: Path) -> None:
        self._one, self._other = one, other
        self.times = 0
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._swap)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stops.set()
        self._thread.join()
        shutil.rmtree(self._other)
        if self.times == 0:
            raise RuntimeError(f"{self._one}: it was not replaced during the load")

    def _swap(self) -> None:
        while not self._stops.wait(0.0003):
            self.times += exchange(self._one, self._other)
