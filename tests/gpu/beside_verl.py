"""verl updates adapters in memory in a real vLLM on two GPUs: every answer against the reference.

    python -m tests.gpu.beside_verl --work DIR --out docs/gpu/RELEASE-verl.json

Needs vLLM, lorashard's entry point and verl's files on PYTHONPATH (`pip install --no-deps --target
DIR verl==0.9.1`). verl's own code runs: its extension of vLLM's workers, which patches how vLLM
loads LoRA, and its transfer, from a trainer process on each GPU. As verl does it, each update
removes the adapter and adds it again under the same name and id. 15 experts lie on two ranks. Ends
with 1 if an answer with the plugin is not right. Logs: DIR/logs.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from tests.gpu.cases import Case
from tests.gpu.models import build_all
from tests.gpu.processes import child_environment, run
from tests.gpu.verl_engine import (
    ENGINES,
    NUM_EXPERTS,
    STOCK_ENGINES,
    Result,
    experts_of,
    ways,
)
from tests.gpu.verl_files import release

LIMIT_S = 330.0


def _engine_result(work: Path, label: str, case: Case, stock: bool, replica: int) -> Result:
    """Run the engine in a process of its own, and judge what it wrote."""
    name = _label(case, stock)
    directory = work / "logs" / f"{label}-verl"
    log, result = directory / f"{name}.log", directory / f"{name}.jsonl"
    result.unlink(missing_ok=True)
    command = ["-m", "tests.gpu.verl_engine", "--work", str(work), "--engine", case.name]
    command += ["--result", str(result), *(["--stock"] if stock else [])]
    changes = {
        # In the names of verl's sockets.
        "VERL_RAY_JOB_ID": str(os.getpid()),
        "VERL_REPLICA_RANK": str(replica),
        "VLLM_CACHE_ROOT": str(directory / name),
    }
    started = time.monotonic()
    ended = run(command, log, child_environment(stock, changes), LIMIT_S)
    lines = [json.loads(x) for x in result.read_text().splitlines()] if result.exists() else []
    text = log.read_text(errors="replace")
    problems = list(_problems(case, lines, text, stock)) + ([ended] if ended else [])
    document = {
        "engine": case.name,
        "flags": case.flags,
        "stock": stock,
        "seconds": round(time.monotonic() - started, 1),
        "results": lines,
        "ended": ended,
        "problems": problems,
        "as_expected": not problems,
    }
    verdict = "info" if stock else "FAIL" if problems else "ok  "
    print("\n     ".join([f"{verdict} {label} verl {name}", *problems]), flush=True)
    return document


def _label(case: Case, stock: bool) -> str:
    return f"{case.name}-stock" if stock else case.name


def _problems(case: Case, lines: list[Result], log: str, stock: bool) -> Iterator[str]:
    updates = [line for line in lines if "adapter" in line]
    yield from (_described(line) for line in updates if not line["right"])
    wanted = sum(len(way.adapters) for way in ways(stock))
    if len(updates) < wanted:
        yield f"{len(updates)} of {wanted} updates"
    for line in lines:
        if "after" in line and not line["right"]:
            yield f"the base model's answer changed by {line['error']}"
    # Whether it was the plugin that gave each rank its experts, if there were any tensors for it.
    for rank, experts in enumerate(() if stock else experts_of(case)):
        loads = sum(line["tensors"][rank] > 0 for line in updates if "tensors" in line)
        logged = f"from tensors: experts of ep rank {rank} of 2 ({len(experts)} of {NUM_EXPERTS} in"
        if (found := len(re.findall(re.escape(logged), log))) != loads:
            yield f"{found} loads of rank {rank} in the log, not {loads}"


def _described(line: Result) -> str:
    name = f"{line['adapter']}, {line['form']}"
    if "failure" in line:
        return f"{name}: {line['failure'].splitlines()[0][:200]}"
    return f"{name}: error {line['error']} > {line['limit']} or correlation {line['correlation']}"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.beside_verl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="models, adapters and logs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--only", nargs="*", metavar="ENGINE", help="as eager or eager-stock")
    parser.add_argument("--jobs", type=int, default=6, help="engines at a time (default: 6)")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    args = parser.parse_args()
    args.work = args.work.absolute()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    build_all(args.work / "models", sorted({case.model for case in ENGINES}))
    if args.prepare:
        return 0
    label = version("vllm").split("+")[0]
    known = [(case, False) for case in ENGINES] + [(case, True) for case in STOCK_ENGINES]
    wanted = [engine for engine in known if not args.only or _label(*engine) in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(_engine_result, args.work, label, case, stock, replica)
            for replica, (case, stock) in enumerate(wanted)
        ]
        engines = [future.result() for future in futures]
    verl = {"verl": release(), "engines": engines}
    if args.out:
        document = {"release": label, "stock": False, "cases": [], "beside_verl": verl}
        args.out.write_text(json.dumps(document, indent=1))
    return int(not all(engine["as_expected"] for engine in engines if not engine["stock"]))


if __name__ == "__main__":
    sys.exit(main())
