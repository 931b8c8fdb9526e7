"""The time of a step with LoRA: two data-parallel engines, beside stock vLLM's, and beside -tp 2.

    python -m tests.gpu.dp_speed --work DIR --out FILE [--only dp dp-stock tp] [--nccl LIBRARY]

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32, CUDA graphs. Stock is right
only where all engines have the same adapters in the same slots, so there one adapter is used on both.
Decode: 32 requests of 32 tokens that generate 64 each; the time from step to step while each engine has
all of its requests. Prefill: 128 requests of 960 tokens that generate one; the GPU's time for a token
while both engines take steps of 8,192. All servers are up at the same time, each on CPUs of its own, and
are asked in turn, each once the one before is at rest, so that whatever else slows the host down meets
all of them; the steps of all rounds after one that is not counted. FILE is written after each round.
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
from tests.gpu.processes import child_environment, cpus_apart, gpu_name, run
from tests.gpu.server import Server
from tests.gpu.step_figures import Found, Series, summarise
from tests.gpu.throughput import DECODE, EXTENSION, PREFILL, measure, print_speeds

KINDS = ("dp", "dp-stock", "tp")
ROUNDS = 8
# Of prefill so many that an engine's fill several of its steps.
NUM_REQUESTS = {DECODE: 32, PREFILL: 128}
# Served name -> adapter. Stock is asked for one.
SERVED = {"a": 0, "b": 1}
# What each of two engines, or halves of the requests, is asked for.
MIXES = {"base": ("base", "base"), "one adapter": ("a", "a"), "two adapters": ("a", "b")}


def command(work: Path, kind: str) -> list[str]:
    """Arguments of Python."""
    parallel = ("-tp", "2") if kind == "tp" else ("-dp", "2", "-tp", "1", "--api-server-count", "1")
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(work / "model")),
        *("--load-format", "dummy", *parallel, "--enable-expert-parallel", "--enable-lora"),
        *("--max-lora-rank", "32", "--max-loras", "2", "--max-cpu-loras", "2"),
        *("--served-model-name", "base", "--max-model-len", "1024", "--max-num-seqs", "32"),
        *("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(2 << 30)),
        *("--no-enable-prefix-caching", *EXTENSION, "--compilation-config"),
        json.dumps({"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}),
        "--lora-modules",
        *(
            f"{name}={adapter_directory(work, 'per_expert', number, shards=False)}"
            for name, number in SERVED.items()
        ),
    ]


def measure_round(servers: Mapping[str, Server], found: Found) -> None:
    """One more round of each server for each workload and mix of adapters."""
    for workload, num_requests in NUM_REQUESTS.items():
        for mix, names in MIXES.items():
            for kind, server in servers.items():
                if kind == "dp-stock" and mix == "two adapters":
                    continue
                what = f"{workload.name}, {mix}"
                measure(
                    server,
                    names * (num_requests // len(names)),
                    workload,
                    found[kind].setdefault(what, Series(workload.unit)),
                    num_engines=1 if kind == "tp" else 2,
                )


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
    found: Found = {kind: {} for kind in args.only}
    with ExitStack() as stack:
        servers = {}
        for kind, cpus in zip(args.only, cpus_apart(len(args.only)), strict=True):
            log = logs / kind / "server.log"
            log.parent.mkdir(exist_ok=True)
            servers[kind] = Server(command(work, kind), log, stock=kind == "dp-stock", cpus=cpus)
            stack.callback(servers[kind].end)
        for kind, server in servers.items():
            print(f"{kind}: started, {server.wait():.0f} s", flush=True)
        for _ in range(args.rounds + 1):
            measure_round(servers, found)
            document["dp_speed"] = {"gpu": gpu_name(), **summarise(found, "dp-stock", "dp")}
            args.out.write_text(json.dumps(document, indent=1))
    print_speeds(document["dp_speed"])


if __name__ == "__main__":
    _main()
