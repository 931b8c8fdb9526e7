"""The time of a step with 0, 1 and 4 adapters in use: stock vLLM beside the plugin, -tp 2 with EP.

    python -m tests.gpu.tp_speed --work DIR --out FILE [--rounds 7]

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32, CUDA graphs; 1, 16 and 64
requests at a time. Decode: 32 tokens, and 64 are generated; the time from step to step with all requests.
Prefill: 960 tokens, and one is generated; the GPU's time for a token of a step of all prompts or of 8,192
tokens. Experts are placed evenly and in order, where stock vLLM is right, too. Both servers are up at the
same time, each on CPUs of its own, and are asked in turn; the steps of all rounds after one that is not
counted. FILE is written after each round.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from tests.gpu.checkpoint import save_tokenizer
from tests.gpu.load_adapters import ADAPTERS_PER_FORMAT, VOCABULARY, adapter_directory
from tests.gpu.processes import child_environment, cpus_apart, gpu_name, run
from tests.gpu.server import Server
from tests.gpu.step_figures import Found, Series, summarise
from tests.gpu.throughput import DECODE, EXTENSION, PREFILL, measure, print_speeds

KINDS = ("stock", "plugin")
NUM_LORAS, BATCHES, ROUNDS = 4, (1, 16, 64), 7
ADAPTERS = tuple(f"a{number}" for number in range(NUM_LORAS))
# Adapters in use -> who is asked, in turn.
MIXES: Mapping[int, Sequence[str]] = {0: ("base",), 1: ADAPTERS[:1], NUM_LORAS: ADAPTERS}


def command(work: Path) -> list[str]:
    """Arguments of Python. The files of some adapters are the same; to vLLM they are four."""
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(work / "model")),
        *("--load-format", "dummy", "-tp", "2", "--enable-expert-parallel", "--enable-lora"),
        *(
            "--max-lora-rank",
            "32",
            "--max-loras",
            str(NUM_LORAS),
            "--max-cpu-loras",
            str(NUM_LORAS),
        ),
        *("--served-model-name", "base", "--max-model-len", "1024", "--max-num-seqs", "64"),
        *("--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", str(3 << 30)),
        *("--no-enable-prefix-caching", *EXTENSION, "--compilation-config"),
        json.dumps({"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}),
        "--lora-modules",
        *(
            f"{name}={adapter_directory(work, 'per_expert', number % ADAPTERS_PER_FORMAT, shards=False)}"
            for number, name in enumerate(ADAPTERS)
        ),
    ]


def measure_round(servers: Mapping[str, Server], found: Found) -> None:
    """One more round of each server for each workload, batch and number of adapters."""
    for workload in (DECODE, PREFILL):
        for batch in BATCHES:
            # A few prompts are one step or two.
            times = min(16, 64 // batch) if workload is PREFILL else 1
            for count, asked in MIXES.items():
                names = [asked[number % len(asked)] for number in range(batch)]
                what = f"{workload.name}, {batch} at a time, adapters in use: {count}"
                if len(set(names)) < count:
                    continue
                for kind, server in servers.items():
                    series = found[kind].setdefault(what, Series(workload.unit))
                    measure(server, names, workload, series, times=times)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.tp_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    work = args.work.absolute() / "load"
    release = version("vllm").split("+")[0]
    logs = args.work.absolute() / "logs" / f"{release}-tp-speed"
    adapters = ["-m", "tests.gpu.load_adapters", str(work), "--form", "per_expert"]
    run(adapters, logs / "load_adapters.log", child_environment(stock=True), 150.0)
    save_tokenizer(work / "model", VOCABULARY)
    found: Found = {kind: {} for kind in KINDS}
    with ExitStack() as stack:
        servers = {}
        for kind, cpus in zip(KINDS, cpus_apart(len(KINDS)), strict=True):
            log = logs / kind / "server.log"
            server = Server(command(work), log, stock=kind == "stock", cpus=cpus)
            stack.callback(server.end)
            servers[kind] = server
        for kind, server in servers.items():
            print(f"{kind}: started, {server.wait():.0f} s", flush=True)
        for _ in range(args.rounds + 1):
            measure_round(servers, found)
            speeds = {"gpu": gpu_name(), **summarise(found, "stock", "plugin")}
            document = {"release": release, "stock": False, "cases": [], "tp_speed": speeds}
            args.out.write_text(json.dumps(document, indent=1))
    print_speeds(speeds)


if __name__ == "__main__":
    _main()
