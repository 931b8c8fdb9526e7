"""Real engines with EPLB: adapters while experts move, a server, and what a rebalance costs.

    python -m tests.gpu.eplb --work DIR --out FILE            all of it, for the installed vLLM
    python -m tests.gpu.eplb --work DIR --out FILE --first    three engines, about 90 s
    python -m tests.gpu.eplb --work DIR --out FILE --stock    three engines without the plugin

FILE is written after each engine. Ends with 1 if something is not as expected. Logs: DIR/logs.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu.cases import PLAIN
from tests.gpu.eplb_cases import CASES, CHECKS, STOCK_CASES, EplbCase, model_of
from tests.gpu.eplb_server import SHARDS
from tests.gpu.models import build_all
from tests.gpu.prepare import split_each
from tests.gpu.processes import child_environment, gpu_name, last_error, run

EAGER_LIMIT_S, GRAPHS_LIMIT_S = 240.0, 330.0
Result = dict[str, Any]


def _lines(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_case(work: Path, logs: Path, case: EplbCase, *, stock: bool) -> Result:
    """One engine in a process of its own."""
    log, result = logs / f"{case.name}.log", logs / f"{case.name}.jsonl"
    result.unlink(missing_ok=True)
    command = ["-m", "tests.gpu.eplb_engine", "--work", str(work), "--case", case.name]
    command += ["--result", str(result), *(["--stock"] if stock else [])]
    changes = {
        "VLLM_CACHE_ROOT": str(logs / "cache" / case.name),
        "LORASHARD_EXPERT_MAPS": str(logs / f"{case.name}.maps"),
    }
    began = time.monotonic()
    limit_s = GRAPHS_LIMIT_S if case.graphs else EAGER_LIMIT_S
    ended = run(command, log, child_environment(stock, changes), limit_s)
    lines, text = _lines(result), log.read_text(errors="replace")
    problems = _problems(case, lines, text, stock=stock)
    if ended:
        problems.append(f"{ended}: {last_error(text)}")
    return {
        "case": case.name,
        "flags": case.flags,
        "seconds": round(time.monotonic() - began, 1),
        "as_expected": not problems,
        "problems": problems,
        "rearrangements": len(re.findall(r"hold other experts now", text)),
        "results": lines,
    }


def _problems(case: EplbCase, lines: list[Result], text: str, *, stock: bool) -> list[str]:
    judged = [line for line in lines if "adapter" in line]
    problems = []
    for line in judged:
        name = f"round {line['round']} {line['adapter']} {line['form']}"
        if "failure" in line:
            problems.append(f"{name}: {line['failure'].splitlines()[0][:200]}")
        elif not line["right"]:
            problems.append(
                f"{name}: error {line['error']} (limit {line['limit']}), "
                f"correlation {line['correlation']}, base changed by {line.get('leak', 0.0)}"
            )
    wanted = len(case.checks) * case.rounds
    if len(judged) < wanted:
        problems.append(f"{len(judged)} of {wanted} checks")
    last = next((line for line in lines if "finished" in line), {})
    if last.get("moved", 0) < 50:
        problems.append(f"only {last.get('moved', 0)} experts moved")
    if not stock and "hold other experts now" not in text:
        problems.append("the log says nothing of rearrangements")
    return problems


def _summary(result: Result) -> str:
    errors = [line.get("error", 9.0) for line in result["results"] if "adapter" in line]
    base = [line["error"] for line in result["results"] if line.get("base")][:1]
    last = next((line for line in result["results"] if "finished" in line), {})
    verdict = "ok  " if result["as_expected"] else "FAIL"
    text = (
        f"{verdict} {result['case']:24} {result['seconds']:6.1f} s  base {base}  {len(errors)} "
        f"answers, errors {min(errors, default=9.0)} to {max(errors, default=9.0)}, "
        f"{last.get('steps')} steps, {result['rearrangements']} rearrangements, "
        f"{last.get('moved')} experts moved"
    )
    return "\n       ".join([text, *result["problems"][:8]])


def _extra(work: Path, logs: Path, module: str, limit_s: float) -> Result:
    out = logs / f"{module}.json"
    out.unlink(missing_ok=True)
    command = ["-m", f"tests.gpu.{module}", "--work", str(work), "--out", str(out)]
    ended = run(command, logs / f"{module}.log", child_environment(stock=False), limit_s)
    found: Result = json.loads(out.read_text()) if out.exists() else {"as_expected": False}
    return {"case": module, "ended": ended} | found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.eplb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", action="store_true", help="three engines, the quickest")
    parser.add_argument("--stock", action="store_true", help="without the plugin")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--no-cost", action="store_true", help="not how long a rebalance takes")
    parser.add_argument("--jobs", type=int, default=5, help="engines at a time (default: 5)")
    args = parser.parse_args()
    from importlib.metadata import version

    release = version("vllm").split("+")[0]
    work = args.work.absolute()
    logs = work / "logs" / f"{release}-eplb{'-stock' if args.stock else ''}"
    models = sorted({model_of(case.num_redundant) for case in CASES})
    build_all(work / "models", models)
    in_checks = {(check.adapter, check.form) for check in CHECKS if check.form != PLAIN}
    for model in models:
        split_each(work / "models" / model, in_checks | {(name, "shards") for name in SHARDS})
    cases = [
        case
        for case in (STOCK_CASES if args.stock else CASES)
        if (not args.first or case.is_first) and (not args.only or case.name in args.only)
    ]
    found: dict[str, Any] = {"stock": args.stock, "gpu": gpu_name(), "cases": []}
    # As the other documents in docs/gpu, whose cases are those of tests/gpu/cases.py.
    document = {"release": release, "stock": args.stock, "cases": [], "eplb": found}
    jobs: list[Callable[[], Result]] = [
        lambda case=case: run_case(work, logs, case, stock=args.stock)  # type: ignore[misc]
        for case in cases
    ]
    whole = not (args.stock or args.first or args.only)
    if whole:
        jobs.insert(2, lambda: _extra(work, logs, "eplb_server", 300.0))
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(job) for job in jobs]):
            result = future.result()
            found["cases"].append(result)
            print(
                _summary(result) if "results" in result else json.dumps(result)[:3000], flush=True
            )
            args.out.write_text(json.dumps(document, indent=1))
    if whole and not args.no_cost:
        found["cost"] = _extra(work, logs, "eplb_cost", 300.0)
        print(json.dumps(found["cost"])[:3000], flush=True)
        args.out.write_text(json.dumps(document, indent=1))
    right = [case["as_expected"] for case in found["cases"]]
    return int(not args.stock and not all(right))


if __name__ == "__main__":
    sys.exit(main())
