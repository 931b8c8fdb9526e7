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
import re
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.gpu.cases import SPLITS, Case
from tests.gpu.engine import Expected
from tests.gpu.load_cycles import NUM_NAMES, Cycles
from tests.gpu.load_traffic import ADAPTERS, NUM_REQUESTS, Judge, Names, Traffic
from tests.gpu.models import build_all
from tests.gpu.prepare import lorashard, split_each
from tests.gpu.processes import ROOT, gpu_name, one_at_a_time
from tests.gpu.server import SMALL, Server
from tests.gpu.unloading import adapters_of_workers
from tests.tiny import save_adapter

MODEL = "glm15-versions"
TOLERANCE_MB = 0.2  # of growth a cycle, during which some hundred requests are answered
SAMPLED_EVERY = 5  # cycles
# Prompts whose answers do not differ by more say nothing about which adapter it was.
UNCHANGED = 1e-3


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
    parser.add_argument("--release", help="vLLM's (default: the installed one)")
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
    # As docs/gpu has its files, so that `make docs` shows it.
    release = args.release or version("vllm").split("+")[0]
    whole = {"release": release, "stock": False, "cases": [], "load_cycles": document}
    args.out.write_text(json.dumps(whole, indent=1))
    shown = {key: value for key, value in document.items() if key not in ("rows", "problems")}
    print(json.dumps(shown), flush=True)
    print("FAIL" if problems else "ok  ", "load", *problems, sep="\n     " if problems else " ")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(_main())
