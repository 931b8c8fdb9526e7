"""A thousand load, unload and swap cycles on a live server with two ranks, bad adapters mixed in.

    python -m tests.gpu.load --work DIR --out FILE [--cycles 1000] [--graphs]

32 requests are in flight all the time, over 8 adapters of which 4 are loaded. Each cycle replaces the
adapter under one of 4 names, and every fourth also tries a bad one: incomplete, truncated, of another
model, for another EP size, replaced while it is read, or on a disk that fails on rank 1. Every answer is
compared with the float32 reference of what its name stood for. Ends with 1 unless all answers are right,
each bad adapter is refused within seconds with its reason (or loaded right), and memory is flat.
Logs: DIR/load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorashard.storage.syscalls import exchange
from tests.gpu.cases import SPLITS, Case
from tests.gpu.engine import Expected
from tests.gpu.models import build_all
from tests.gpu.prepare import lorashard, split_each
from tests.gpu.processes import ROOT, gpu_name, one_at_a_time
from tests.gpu.server import RANK_FILES, SMALL, Server, damage
from tests.gpu.unloading import adapters_of_workers
from tests.tiny import save_adapter

MODEL = "glm15-versions"
ADAPTERS = (*(f"v{number}" for number in range(7)), "fused0")
NUM_NAMES, NUM_REQUESTS, TOKENS = 4, 32, 24
BAD_EVERY = 4  # cycles
MOST_S = 10.0  # until a bad adapter is refused
TOLERANCE_MB = 0.2  # of growth a cycle, during which some hundred requests are answered
SAMPLED_EVERY = 5  # cycles
UNCHANGED = (
    1e-3  # prompts whose answers do not differ by more say nothing about which adapter it was
)


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
                lambda: self._on_workers("break_disk", 1, str(path)),
                lambda: self._on_workers("mend_disk"),
            )
        other = path.with_name(f"{path.name}-other")
        shutil.copytree(self.shards(second), other)
        swapping = Swapping(path, other)
        return (first, second), swapping.start, swapping.end

    def _on_workers(self, method: str, *arguments: Any) -> None:
        status, body = self._server.post(
            "/collective_rpc", {"method": method, "args": list(arguments)}
        )
        if status != 200:
            raise RuntimeError(f"/collective_rpc {method}: {status} {body[:300]}")


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


def pinned_mb(pid: int) -> float:
    """MB that the processes below `pid` have pinned or locked, as far as the kernel counts it."""
    import psutil

    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        total += sum(
            int(size) for size in re.findall(r"^Vm(?:Lck|Pin):\s+(\d+)", text, re.MULTILINE)
        )
    return round(total / 1024, 2)


def prepare(work: Path) -> Expected:
    """Models, adapters and shards."""
    models = work / "models"
    build_all(models, [MODEL])
    wanted = [(adapter, "shards") for adapter in ADAPTERS] + [(ADAPTERS[0], "shards-ep4")]
    assert all(form in SPLITS for _, form in wanted)
    split_each(models / MODEL, wanted)
    folder = work / "load"
    with one_at_a_time(folder):
        shutil.rmtree(folder / "another-model", ignore_errors=True)
        tiny = save_adapter(folder / "tiny")
        lorashard("split", str(tiny), "--ep-size", "2", "-o", str(folder / "another-model"), "-q")
    return Expected.load(work, Case(MODEL, MODEL, ()))


def serve_command(model: Path, *, graphs: bool) -> list[str]:
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model), *SMALL),
        *("--max-num-seqs", str(NUM_REQUESTS + 8)),
        *("-tp", "2", "--enable-expert-parallel", "--enable-lora", "--fully-sharded-loras"),
        *("--max-lora-rank", "32"),
        *("--max-loras", str(NUM_NAMES + 1), "--max-cpu-loras", str(2 * NUM_NAMES)),
        *("--worker-extension-cls", "tests.gpu.failing_disk.FailingDisk"),
        *(() if graphs else ("--enforce-eager",)),
    ]


def run_cycles(
    server: Server, expected: Expected, args: argparse.Namespace, document: dict[str, Any]
) -> None:
    """All cycles; fills the document as it goes."""
    from watch_server import gpu_memory, memory_of_tree

    names, judge = Names(), Judge(expected)
    document["closest_pair"] = round(judge.closest_pair(), 4)
    if document["closest_pair"] < UNCHANGED:
        raise RuntimeError("two adapters answer alike, so nothing can be told from answers")
    cycles = Cycles(server, names, judge, args.work / "models" / MODEL, args.work / "load")
    for cycle in range(NUM_NAMES):  # before the requests begin
        cycles.run(cycle)
    traffic = Traffic(server, names, judge)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    try:
        for cycle in range(NUM_NAMES, args.cycles):
            cycles.run(cycle)
            row: dict[str, Any] = {"step": cycle - NUM_NAMES}
            if cycle % SAMPLED_EVERY == 0:
                row |= memory_of_tree(server.process.pid) | gpu_memory()
                row["pinned_mb"] = pinned_mb(server.process.pid)
            rows.append(row)
            if server.process.poll() is not None or server.get("/health")[0] != 200:
                cycles.problems.append(f"cycle {cycle}: the engine is dead")
                break
            if time.monotonic() - began > args.limit:
                break
            if cycle % 50 == 0:
                print("CYCLE", cycle, dict(traffic.answers), len(cycles.problems), flush=True)
    finally:
        traffic.stop()
        document |= {
            "cycles": NUM_NAMES + len(rows),
            "seconds": round(time.monotonic() - began, 1),
            "answers": dict(traffic.answers),
            "slowest_answer_s": round(traffic.slowest_s, 3),
            "largest_error": round(traffic.largest_error, 4),
            "load_s": _spread(cycles.load_s),
            "bad": cycles.bad,
            "memory": flatness_of(rows),
            "problems": [*cycles.problems[:50], *traffic.wrong[:50]],
            "rows": rows,
        }
    held = adapters_of_workers(server)
    document["workers"] = [sorted(one) for one in held]
    if any(one != held[0] for one in held):
        document["problems"].append(f"the workers have different adapters: {held}")


def flatness_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As watch_server has it, for rows of which some have no memory; pinned memory in its words too."""
    from watch_server import flatness

    sampled = [
        row | {"step": number} for number, row in enumerate(r for r in rows if "rss_mb" in r)
    ]
    found: dict[str, Any] = flatness(sampled, SAMPLED_EVERY * TOLERANCE_MB)
    renamed = [{"step": row["step"], "gpu_mb": row["pinned_mb"]} for row in sampled]
    found["pinned_mb"] = flatness(renamed, SAMPLED_EVERY * TOLERANCE_MB).get("gpu_mb")
    return found


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    places = {"min": 0, "median": len(ordered) // 2, "max": -1}
    return {name: round(ordered[at], 4) for name, at in places.items()}


def problems_of(document: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    problems = list(document.get("problems", []))
    if "failure" in document:
        problems.append(document["failure"])
    elif document["cycles"] < document["asked_cycles"]:
        problems.append(f"only {document['cycles']} cycles in {document['seconds']} s")
    if document.get("memory", {}).get("flat") is False:
        problems.append("memory grows")
    if "answers" in document and not document["answers"].get("right"):
        problems.append("no right answer")
    problems += [
        f"{kind}: never tried" for kind, row in document.get("bad", {}).items() if not row["tried"]
    ]
    return problems


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="models, bad adapters and logs")
    parser.add_argument("--out", type=Path, default=Path("lorashard-load.json"))
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs: a slower start")
    parser.add_argument("--limit", type=float, default=400, help="seconds for the cycles")
    args = parser.parse_args()
    args.work = args.work.absolute()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT / "docs" / "recipes"))
    expected = prepare(args.work)
    document: dict[str, Any] = {
        "asked_cycles": args.cycles, "requests_in_flight": NUM_REQUESTS, "adapters": len(ADAPTERS),
        "graphs": args.graphs, "gpu": gpu_name(),
    }  # fmt: skip
    command = serve_command(args.work / "models" / MODEL / "model", graphs=args.graphs)
    server = Server(command, args.work / "load" / "vllm-serve.log")
    try:
        document["started_s"] = round(server.wait(), 1)
        run_cycles(server, expected, args, document)
    except (RuntimeError, OSError) as err:
        document["failure"] = str(err)[:1000]
    finally:
        server.end()
    problems = problems_of(document)
    document |= {"problems": problems, "as_expected": not problems}
    args.out.write_text(json.dumps(document, indent=1))
    shown = {key: value for key, value in document.items() if key not in ("rows", "problems")}
    print(json.dumps(shown), flush=True)
    print("FAIL" if problems else "ok  ", "load", *problems, sep="\n     " if problems else " ")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(_main())
