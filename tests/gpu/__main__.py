"""Serve adapters with a real vLLM on two GPUs and compare every answer with a float32 reference.

    python -m tests.gpu --work DIR                       the matrix, with the plugin
    python -m tests.gpu --work DIR --stock               the same without it; nothing can fail
    python -m tests.gpu --work DIR --only glm15 glm16    some cases
    python -m tests.gpu --work DIR --kinds               other families and kinds of weights
    python -m tests.gpu --work DIR --http --load         also a real server, also load times
    python -m tests.gpu --work DIR --no-matrix --start-line    the server as users start theirs

Needs vLLM on PYTHONPATH and, but for --stock, lorashard's entry point. Ends with 1 if a case is
not as expected. Logs: DIR/logs.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu.cases import Case, as_stock
from tests.gpu.engine import LEAK_ROOM
from tests.gpu.kinds_cases import applying
from tests.gpu.models import FINISHED, build_all
from tests.gpu.prepare import split_all
from tests.gpu.processes import child_environment, last_error, run

EAGER_LIMIT_S, GRAPHS_LIMIT_S = 200.0, 330.0
# Beyond this the reference is not of this model: FP8 gives 0.13, bf16 0.07 at most.
WORST_BASE_ERROR = 0.3
Result = dict[str, Any]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="models, adapters and logs")
    parser.add_argument("--release-label", help="vLLM's release (default: the installed one)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these cases")
    parser.add_argument("--kinds", action="store_true", help="kinds_cases.py, not the matrix")
    parser.add_argument("--jobs", type=int, default=5, help="engines at a time (default: 5)")
    parser.add_argument("--stock", action="store_true", help="without the plugin, for comparison")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    parser.add_argument("--prepare", action="store_true", help="only make models and shards")
    parser.add_argument("--no-matrix", action="store_true", help="only what is asked for beside it")
    parser.add_argument("--http", action="store_true", help="also a real server")
    parser.add_argument("--start-line", action="store_true", help="also start_line.py")
    parser.add_argument("--load", action="store_true", help="also load times")
    parser.add_argument("--align", action="store_true", help="also the op that sorts tokens")
    parser.add_argument("--kernels", help="whose kernels these are, if not the release's own")
    return parser.parse_args()


def _installed_release() -> str:
    """vLLM's version; its package is not imported, that takes seconds."""
    from importlib.metadata import version

    return version("vllm").split("+")[0]


def _read_lines(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _place(args: argparse.Namespace, name: str, suffix: str) -> Path:
    label = f"{args.release_label}{'-stock' if args.stock else ''}"
    return Path(args.work) / "logs" / label / f"{name}{suffix}"


def _run_case(args: argparse.Namespace, asked: Case) -> Result:
    case = as_stock(asked) if args.stock else asked
    log, result = _place(args, case.name, ".log"), _place(args, case.name, ".jsonl")
    result.unlink(missing_ok=True)
    made = (args.work / "models" / case.model / FINISHED).exists()
    command = ["-m", "tests.gpu.engine", "--work", str(args.work), "--case", case.name]
    command += ["--result", str(result), *(["--stock"] if args.stock else [])]
    # Engines of one configuration share a compile cache and would write to it at the same time.
    cache = {"VLLM_CACHE_ROOT": str(_place(args, "cache", "") / case.name)}
    started = time.monotonic()
    ended = run(
        command,
        log,
        child_environment(args.stock, cache),
        GRAPHS_LIMIT_S if case.graphs else EAGER_LIMIT_S,
    )
    lines, text = _read_lines(result), log.read_text(errors="replace")
    find_problems = _refusal_problems if case.refused else _problems
    problems = find_problems(case, lines, text)
    if ended and not case.refused:
        problems.append(f"{ended}: {last_error(text)}")
    return {
        "case": case.name,
        "model": case.model,
        "flags": case.flags,
        "refused": bool(case.refused),
        # transformers cannot make every model: build_all has said why.
        "optional": case.optional or args.stock or not made,
        "seconds": round(time.monotonic() - started, 1),
        "results": lines,
        "ended": ended,
        "last_error": last_error(text) if ended else "",
        "as_expected": not problems,
        "problems": problems,
    }


def _refusal_problems(case: Case, lines: Iterable[Result], text: str) -> list[str]:
    if any("started" in line for line in lines):
        return ["the engine started"]
    return [] if re.search(case.refused, text) else [f"no {case.refused!r} in the log"]


def _problems(case: Case, lines: list[Result], text: str) -> list[str]:
    judged = [line for line in lines if "adapter" in line]
    problems = [_describe(line) for line in judged if not line["right"] and not line["optional"]]
    wanted = len(case.checks) * case.rounds
    if len(judged) < wanted:
        problems.append(f"{len(judged)} of {wanted} checks")
    for line in lines:
        if "after" in line and not line["right"]:
            problems.append(f"the base model's answer changed by {line['error']}")
        elif line.get("base") and line["error"] > WORST_BASE_ERROR:
            problems.append(f"base model: error {line['error']}")
    patterns = {check.log for check in case.checks if check.log}
    return problems + [f"no {p!r} in the log" for p in patterns if not re.search(p, text)]


def _describe(line: Result) -> str:
    name = f"{line['adapter']} {line['form']}"
    if "failure" in line:
        return f"{name}: {line['failure'].splitlines()[0][:200]}"
    if line.get("leak", 0.0) >= LEAK_ROOM:
        return f"{name}: the base model's answer changed by {line['leak']} afterwards"
    if "generated_error" in line:
        name = f"{name} (generated: {line['generated_error']})"
    return f"{name}: error {line['error']} > {line['limit']} or correlation {line['correlation']}"


def _summary(result: Result) -> str:
    errors = [str(line.get("error", "fails")) for line in result["results"] if "adapter" in line]
    base = [str(line["error"]) for line in result["results"] if line.get("base")][:1]
    verdict = "ok  " if result["as_expected"] else "info" if result["optional"] else "FAIL"
    text = f"{verdict} {result['case']:26} {result['seconds']:6.1f} s  base {' '.join(base) or '-'}"
    text += f"  adapters {' '.join(errors) or '-'}"
    return "\n       ".join([text, *result["problems"]])


def _run_matrix(args: argparse.Namespace, cases: Sequence[Case], document: dict[str, Any]) -> None:
    """Run the cases; every result is written as soon as it is there."""
    results: list[Result] = []
    document["cases"] = results
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(_run_case, args, case) for case in cases]
        for future in as_completed(futures):
            results.append(future.result())
            print(_summary(results[-1]), flush=True)
            _write(args, document)


def _write(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.out:
        args.out.write_text(json.dumps(document, indent=1))


def _run_extra(args: argparse.Namespace, module: str, limit_s: float) -> Result:
    """`server`, `load_time` or `align`: each writes one JSON document with `as_expected`."""
    log, out = _place(args, module, ".log"), _place(args, module, ".json")
    out.unlink(missing_ok=True)
    command = ["-m", f"tests.gpu.{module}", "--work", str(args.work), "--out", str(out)]
    ended = run(command, log, child_environment(args.stock), limit_s)
    document: Result = json.loads(out.read_text()) if out.exists() else {"as_expected": False}
    document |= {"name": module, "ended": ended}
    failed = bool(ended) or not document["as_expected"]
    print(
        f"{'FAIL' if failed else 'ok  '} {module} {ended}", json.dumps(document)[:3000], flush=True
    )
    return document | {"as_expected": not failed}


def main() -> int:
    """Returns the exit status."""
    args = _parse_arguments()
    args.work = args.work.absolute()
    if not args.release_label:
        args.release_label = _installed_release()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    servers = args.http or args.start_line
    cases = applying(args.release_label, args.only, kinds=args.kinds)
    if args.no_matrix:
        cases = []
    # Servers serve glm16.
    models = dict.fromkeys([*(case.model for case in cases), *(["glm16"] if servers else [])])
    build_all(args.work / "models", models)
    split_all(args.work / "models", models)
    if args.prepare:
        return 0
    document: dict[str, Any] = {"release": args.release_label, "stock": args.stock}
    if args.kernels:
        document["kernels"] = args.kernels
    document["cases"] = []
    _run_matrix(args, cases, document)
    if args.http:
        document["http"] = _run_extra(args, "server", 420.0)
    if args.start_line:
        document["start_line"] = _run_extra(args, "start_line", 420.0)
    if args.load:
        document["load"] = _run_extra(args, "load_time", 560.0)
    if args.align:
        document["align"] = _run_extra(args, "align", 120.0)
    _write(args, document)
    wrong = [
        case["case"]
        for case in document["cases"]
        if not case["as_expected"] and not case["optional"]
    ]
    extras = [document[key] for key in ("http", "start_line", "load", "align") if key in document]
    return int(bool(wrong) or not all(extra["as_expected"] for extra in extras))


if __name__ == "__main__":
    sys.exit(main())
