"""Tokens a second with LoRA: two data-parallel engines, beside stock vLLM's, and beside -tp 2.

    python -m tests.gpu.dp_speed --work DIR --out FILE [--only dp dp-stock tp] [--nccl LIBRARY]

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32, CUDA graphs. Stock is right
only where all engines have the same adapters in the same slots, so there one adapter is used on both.
Decode: 32 requests of 32 tokens that generate 128 each. Prefill: 32 requests of 960 tokens that generate
one. All servers are up at the same time and are asked in turn, so that whatever else slows the host down
meets all of them; medians of the rounds after one that is not counted. FILE is written after each round.
"""

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.gpu.checkpoint import save_tokenizer
from tests.gpu.load_adapters import VOCABULARY, adapter_directory
from tests.gpu.nccl import nccl_variables
from tests.gpu.processes import child_environment, run
from tests.gpu.server import Server
from tests.gpu.throughput import DECODE, PREFILL, Figures, summarise, tokens_a_second

KINDS = ("dp", "dp-stock", "tp")
NUM_REQUESTS, ROUNDS = 32, 9
# Served name -> adapter. Stock is asked for one.
SERVED = {"a": 0, "b": 1}
# What each of two engines, or halves of the requests, is asked for.
MIXES = {"base": ("base", "base"), "one adapter": ("a", "a"), "two adapters": ("a", "b")}


def command(work: Path, kind: str) -> list[str]:
    """Arguments of Python."""
    parallel = ("-tp", "2") if kind == "tp" else ("-dp", "2", "-tp", "1", "--api-server-count", "1")
    served = SERVED if kind != "dp-stock" else {"a": 0}
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(work / "model")),
        *("--load-format", "dummy", *parallel, "--enable-expert-parallel", "--enable-lora"),
        *("--max-lora-rank", "32", "--max-loras", "2", "--max-cpu-loras", "2"),
        *("--served-model-name", "base", "--max-model-len", "1024", "--max-num-seqs", "32"),
        *("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(2 << 30)),
        *("--no-enable-prefix-caching", "--compilation-config"),
        json.dumps({"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}),
        "--lora-modules",
        *(
            f"{name}={adapter_directory(work, 'per_expert', number, shards=False)}"
            for name, number in served.items()
        ),
    ]


def measure_round(servers: Mapping[str, Server], figures: Figures) -> None:
    """One more figure of each server for each workload and mix of adapters."""
    for workload in (DECODE, PREFILL):
        for mix, names in MIXES.items():
            for kind, server in servers.items():
                if kind == "dp-stock" and mix == "two adapters":
                    continue
                figure = tokens_a_second(
                    server,
                    names * (NUM_REQUESTS // len(names)),
                    workload,
                    num_engines=1 if kind == "tp" else 2,
                )
                figures[kind].setdefault(f"{workload.name}, {mix}", []).append(round(figure, 1))


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.dp_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--nccl", type=Path, help="a library that tests.gpu.nccl has built")
    args = parser.parse_args()
    work = args.work.absolute() / "load"
    from importlib.metadata import version

    release = version("vllm").split("+")[0]
    logs = args.work.absolute() / "logs" / f"{release}-dp-speed"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.update(nccl_variables(logs, args.nccl))
    adapters = ["-m", "tests.gpu.load_adapters", str(work), "--form", "per_expert"]
    run(adapters, logs / "load_adapters.log", child_environment(stock=True), 150.0)
    save_tokenizer(work / "model", VOCABULARY)
    document: dict[str, Any] = {"release": release, "stock": False, "cases": []}
    figures: Figures = {kind: {} for kind in args.only}
    with ExitStack() as stack:
        servers = {}
        for kind in args.only:
            log = logs / kind / "server.log"
            log.parent.mkdir(exist_ok=True)
            servers[kind] = Server(command(work, kind), log, stock=kind == "dp-stock")
            stack.callback(servers[kind].end)
        for kind, server in servers.items():
            print(f"{kind}: started, {server.wait():.0f} s", flush=True)
        for _ in range(args.rounds + 1):
            measure_round(servers, figures)
            document["dp_speed"] = summarise(figures)
            args.out.write_text(json.dumps(document, indent=1))
    for kind, found in document["dp_speed"].items():
        print(kind, {what: of["tokens_a_second"] for what, of in found.items()}, flush=True)


if __name__ == "__main__":
    _main()
