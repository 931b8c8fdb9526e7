"""Hundreds of adapter versions through one server: docs/recipes/rl_swaps.py against a real vLLM.

    python -m tests.gpu.swaps --work DIR [--steps 300] [--tp 1] [--out lorashard-swaps.json]

First with the plugin and shard directories, then stock vLLM with the same versions as plain
adapters. With --tp 1 there is one rank, which is what one GPU can show: versions, answers and
memory. Ends with 1 unless, with the plugin, every answer was its version's, version 0's is the
float32 reference's, and memory is flat. Stock is reported only. Logs: DIR/swaps.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.gpu.cases import CASES
from tests.gpu.engine import Expected
from tests.gpu.models import FINISHED, build
from tests.gpu.processes import ROOT, child_environment
from tests.gpu.server import SMALL, Server

SCRIPT = ROOT / "docs" / "recipes" / "rl_swaps.py"
MODEL, ADAPTER = "glm16", "e0"
# What is printed of a run; rows and answers are in the file alone.
BULK = ("rows", "answers_of_version_0")


def serve_command(model: Path, tp: int, *, stock: bool, graphs: bool) -> list[str]:
    """The recipe's command. Stock stops at --fully-sharded-loras with expert parallelism."""
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model), *SMALL),
        *("-tp", str(tp), "--enable-expert-parallel", "--enable-lora", "--max-lora-rank", "32"),
        *("--max-loras", "2", "--max-cpu-loras", "4"),
        *(() if stock else ("--fully-sharded-loras",)),
        *(() if graphs else ("--enforce-eager",)),
    ]


def swap_command(server: Server, args: argparse.Namespace, directory: Path) -> list[str]:
    """rl_swaps.py as a user runs it. directory: named after the kind of server."""
    prompts = directory / "prompts.json"
    return [
        *(sys.executable, str(SCRIPT), "--server", server.url, "--pid", str(server.process.pid)),
        *("--adapter", str(args.work / "models" / MODEL / ADAPTER), "--prompts", str(prompts)),
        *("--workdir", str(directory / "versions"), "--steps", str(args.steps), "--keep", "2"),
        *(("--plain",) if directory.name == "stock" else ("--ep-size", str(args.tp))),
    ]


def run_script(command: list[str], directory: Path, limit_s: float) -> dict[str, Any]:
    """Its report; of a run that was ended, the rows."""
    out, talk = directory / "report.json", directory / "steps.jsonl"
    with out.open("wb") as data, talk.open("wb") as lines:
        environment = child_environment(stock=False)
        try:
            subprocess.run(
                command, stdout=data, stderr=lines, env=environment, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            rows = [json.loads(row) for row in talk.read_text().splitlines() if row[:1] == "{"]
            return {"failure": f"no end after {limit_s:.0f} s", "rows": rows, "steps": len(rows)}
    text = out.read_text()
    return json.loads(text) if text else {"failure": talk.read_text()[-1500:]}


def measure(args: argparse.Namespace, kind: str, expected: Expected) -> dict[str, Any]:
    """One server of either kind, and all steps on it."""
    directory = args.work / "swaps" / kind
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "versions").mkdir(parents=True)
    (directory / "prompts.json").write_text(json.dumps(expected.prompts.tolist()))
    model = args.work / "models" / MODEL / "model"
    command = serve_command(model, args.tp, stock=kind == "stock", graphs=args.graphs)
    server = Server(command, directory / "vllm-serve.log", stock=kind == "stock")
    document: dict[str, Any] = {}
    try:
        document["started_s"] = round(server.wait(), 1)
        base = server.log_probs("base", expected.prompts)
        document |= run_script(swap_command(server, args, directory), directory, args.limit)
        if answers := document.get("answers_of_version_0"):
            values = [value for _, _, value in answers]
            got = torch.tensor(values).view(base.shape)
            document["version_0_against_reference"] = expected.judge(ADAPTER, got, base)
    except (RuntimeError, OSError) as err:
        document["failure"] = str(err)[:1000]
    finally:
        server.end()
    return document


def problems_of(document: dict[str, Any]) -> list[str]:
    """What is not as it should be with the plugin."""
    problems = [document["failure"]] if "failure" in document else []
    if wrong := document.get("wrong"):
        problems.append(f"another version's answers at steps {wrong[:10]}")
    if not document.get("version_0_against_reference", {}).get("right"):
        problems.append("version 0 does not answer as the reference")
    if document.get("memory", {}).get("flat") is False:
        problems.append("memory grows")
    return problems


def _main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="models, versions and logs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tp", type=int, choices=[1, 2], default=1)
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs: a slower start")
    parser.add_argument("--kinds", nargs="+", default=["plugin", "stock"], metavar="KIND")
    parser.add_argument("--limit", type=float, default=270, help="seconds for the steps of a kind")
    parser.add_argument("--out", type=Path, default=Path("lorashard-swaps.json"))
    args = parser.parse_args()
    args.work = args.work.absolute()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not (args.work / "models" / MODEL / FINISHED).exists():
        build(MODEL, args.work / "models")
    expected = Expected.load(args.work, next(case for case in CASES if case.name == MODEL))
    document: dict[str, Any] = {"steps": args.steps, "tp": args.tp, "graphs": args.graphs}
    for kind in args.kinds:
        document[kind] = measure(args, kind, expected)
        args.out.write_text(json.dumps(document, indent=1))
        shown = {key: value for key, value in document[kind].items() if key not in BULK}
        print(kind, json.dumps(shown), flush=True)
    problems = problems_of(document["plugin"]) if "plugin" in document else []
    document["problems"] = problems
    args.out.write_text(json.dumps(document, indent=1))
    print("FAIL" if problems else "ok  ", "swaps", *problems, sep="\n     " if problems else " ")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(_main())
