"""Real servers with two data-parallel engines (-dp 2 -tp 1) that serve different adapters.

    python -m tests.gpu.dp --work DIR --out FILE              all of it, for the installed vLLM
    python -m tests.gpu.dp --work DIR --out FILE --first      bf16, eager and with CUDA graphs
    python -m tests.gpu.dp --work DIR --out FILE --stock      without the plugin
    ... --no-graphs   eager engines alone      --only NAME ...

FILE is written after each server. Ends with 1 if something is not as expected. Logs: DIR/logs. With
vLLM 0.33.0 and an older NCCL, a library is built with the host's compiler; or --nccl names one that
`python -m tests.gpu.nccl` has built elsewhere.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu.dp_cases import CASES, MODEL, SHARDS, DpCase
from tests.gpu.models import build_all
from tests.gpu.nccl import nccl_variables
from tests.gpu.prepare import split_each
from tests.gpu.processes import child_environment, gpu_name, last_error, run

LIMIT_S = 420
Result = dict[str, Any]


def run_case(
    work: Path, logs: Path, case: DpCase, variables: Mapping[str, str], args: argparse.Namespace
) -> Result:
    """One server, and the process that asks it."""
    result, log = logs / f"{case.name}.jsonl", logs / f"{case.name}.server.log"
    result.unlink(missing_ok=True)
    command = ["-m", "tests.gpu.dp_server", "--work", str(work), "--case", case.name]
    command += ["--out", str(result), "--log", str(log), *(["--stock"] if args.stock else [])]
    command += ["--limit", str(args.limit)]
    command += [] if args.requests is None else ["--requests", str(args.requests)]
    # A folder of their own, so that servers do not compile into each other's.
    changes = {"VLLM_CACHE_ROOT": str(logs / "cache" / case.name), **variables}
    began = time.monotonic()
    ended = run(
        command, logs / f"{case.name}.log", child_environment(args.stock, changes), args.limit + 30
    )
    lines = (
        [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    )
    problems = [_problem(line) for line in lines if "check" in line and not line["right"]]
    problems += [
        str(line["failure"]) for line in lines if "failure" in line and "check" not in line
    ]
    text = log.read_text(errors="replace") if log.exists() else ""
    if not any("finished" in line for line in lines):
        problems.append(f"not finished ({ended or 'no reason'}): {last_error(text)}")
    return {
        "case": case.name,
        "flags": case.flags,
        "seconds": round(time.monotonic() - began, 1),
        "as_expected": not problems,
        "problems": problems,
        "results": lines,
    }


def _problem(line: Result) -> str:
    what = {k: v for k, v in line.items() if k not in ("check", "right")}
    return f"{line['check']}: {json.dumps(what)[:400]}"


def _summary(result: Result) -> str:
    checks = [line for line in result["results"] if "check" in line]
    errors = [line["error"] for line in checks if "error" in line]
    base = [line["error"] for line in result["results"] if line.get("base")]
    right = sum(bool(line["right"]) for line in checks)
    verdict = "ok  " if result["as_expected"] else "FAIL"
    text = (
        f"{verdict} {result['case']:18} {result['seconds']:6.1f} s  base {base}  {right} of "
        f"{len(checks)} checks right, errors {min(errors, default=9.0)} to {max(errors, default=9.0)}"
    )
    return "\n       ".join([text, *result["problems"][:12]])


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.dp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", action="store_true", help="bf16, eager and with CUDA graphs")
    parser.add_argument("--stock", action="store_true", help="without the plugin")
    parser.add_argument("--no-graphs", action="store_true", help="eager engines alone")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument(
        "--requests", type=int, help="mixed requests a server (default: the case's)"
    )
    parser.add_argument("--jobs", type=int, default=5, help="servers at a time (default: 5)")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds a server (420)")
    parser.add_argument("--nccl", type=Path, help="a library that tests.gpu.nccl has built")
    return parser.parse_args()


def main() -> int:
    """Returns the exit status."""
    args = _parse_arguments()
    from importlib.metadata import version

    release = version("vllm").split("+")[0]
    work = args.work.absolute()
    logs = work / "logs" / f"{release}-dp{'-stock' if args.stock else ''}"
    logs.mkdir(parents=True, exist_ok=True)
    variables = nccl_variables(logs, args.nccl)
    build_all(work / "models", [MODEL])
    split_each(work / "models" / MODEL, {(name, "shards") for name in SHARDS})
    cases = [
        case
        for case in CASES
        if (not args.first or case.is_first)
        and (not args.only or case.name in args.only)
        and not (args.no_graphs and case.graphs)
    ]
    found: dict[str, Any] = {"stock": args.stock, "gpu": gpu_name(), "cases": []}
    # As the other documents in docs/gpu, whose cases are those of tests/gpu/cases.py.
    document = {"release": release, "stock": args.stock, "cases": [], "dp": found}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_case, work, logs, case, variables, args) for case in cases]
        for future in as_completed(jobs):
            found["cases"].append(future.result())
            print(_summary(found["cases"][-1]), flush=True)
            args.out.write_text(json.dumps(document, indent=1))
    right = [case["as_expected"] for case in found["cases"]]
    return int(not args.stock and not all(right))


if __name__ == "__main__":
    sys.exit(main())
