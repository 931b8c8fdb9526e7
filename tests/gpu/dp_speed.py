"""Tokens a second with LoRA: two data-parallel engines, beside stock vLLM's, and beside -tp 2.

    python -m tests.gpu.dp_speed --work DIR --out FILE [--only dp dp-stock tp] [--nccl LIBRARY]

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32, CUDA graphs. Stock is right
only where all engines have the same adapters in the same slots, so there one adapter is used on both.
Decode: 32 requests of 32 tokens that generate 128 each. Prefill: 32 requests of 960 tokens that generate
one. Medians of some repeats after one that is not counted. About 100 s a server, one after the other.
"""

import argparse
import json
import random
import signal
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu.checkpoint import save_tokenizer
from tests.gpu.load_adapters import VOCABULARY, adapter_directory
from tests.gpu.nccl import nccl_variables
from tests.gpu.processes import child_environment, exit_after, run
from tests.gpu.server import Server

KINDS = ("dp", "dp-stock", "tp")
NUM_REQUESTS, REPEATS = 32, 4
LIMIT_S = 280
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
        *("--gpu-memory-utilization", "0.8", "--kv-cache-memory-bytes", str(4 << 30)),
        *("--no-enable-prefix-caching", "--compilation-config"),
        json.dumps({"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}),
        "--lora-modules",
        *(
            f"{name}={adapter_directory(work, 'per_expert', number, shards=False)}"
            for name, number in served.items()
        ),
    ]


def tokens_a_second(
    server: Server, names: Sequence[str], *, by_engine: bool, prompt: int, generated: int
) -> float:
    """Of all requests together: generated tokens, or those of prompts if one is generated."""
    chance = random.Random(0)

    def one(number: int) -> int:
        half = number % 2
        body = {
            "model": names[half],
            "prompt": [chance.randrange(5, VOCABULARY - 5) for _ in range(prompt)],
            "max_tokens": generated, "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        status, text = server.post("/v1/completions", body, half if by_engine else None)
        if status != 200:
            raise RuntimeError(f"{names[half]}: {status} {text[:300]}")
        return int(json.loads(text)["usage"]["completion_tokens"])

    began = time.monotonic()
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        done = sum(pool.map(one, range(NUM_REQUESTS)))
    seconds = time.monotonic() - began
    return (done if generated > 1 else NUM_REQUESTS * prompt) / seconds


def measure(work: Path, kind: str, log: Path) -> dict[str, Any]:
    """The figures of one server."""
    server = Server(command(work, kind), log, stock=kind == "dp-stock")

    def stop(*_: object) -> None:
        server.end()
        raise RuntimeError(f"not finished within {LIMIT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    found: dict[str, Any] = {}
    try:
        found["started"] = round(server.wait(), 1)
        for what, prompt, generated in (("decode", 32, 128), ("prefill", 960, 1)):
            for mix, names in MIXES.items():
                if kind == "dp-stock" and mix == "two adapters":
                    continue
                figures = [
                    tokens_a_second(
                        server, names, by_engine=kind != "tp", prompt=prompt, generated=generated
                    )
                    for _ in range(REPEATS + 1)
                ]
                found[f"{what}, {mix}"] = {
                    "tokens_a_second": round(statistics.median(figures[1:]), 1),
                    "all": [round(figure, 1) for figure in figures],
                }
    except (RuntimeError, OSError) as err:
        found["failure"] = str(err)[:500]
    finally:
        signal.alarm(0)
        server.end()
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.dp_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--nccl", type=Path, help="a library that tests.gpu.nccl has built")
    parser.add_argument("--engine", choices=KINDS, help="that server, in this process")
    args = parser.parse_args()
    work = args.work.absolute() / "load"
    if args.engine:
        exit_after(
            lambda: args.out.write_text(
                json.dumps(measure(work, args.engine, args.out.with_suffix(".server.log")))
            )
        )
    from importlib.metadata import version

    release = version("vllm").split("+")[0]
    logs = args.work.absolute() / "logs" / f"{release}-dp-speed"
    logs.mkdir(parents=True, exist_ok=True)
    variables = nccl_variables(logs, args.nccl)
    adapters = ["-m", "tests.gpu.load_adapters", str(work), "--form", "per_expert"]
    run(adapters, logs / "load_adapters.log", child_environment(stock=True), 150.0)
    save_tokenizer(work / "model", VOCABULARY)
    found: dict[str, Any] = {}
    for kind in args.only:
        out = logs / f"{kind}.json"
        out.unlink(missing_ok=True)
        one = ["-m", "tests.gpu.dp_speed", "--work", str(args.work), "--out", str(out)]
        environment = child_environment(stock=kind == "dp-stock", changes=variables)
        ended = run([*one, "--engine", kind], out.with_suffix(".log"), environment, LIMIT_S + 30)
        found[kind] = json.loads(out.read_text()) if out.exists() else {"ended": ended}
        short = {
            k: v["tokens_a_second"] if isinstance(v, dict) else v for k, v in found[kind].items()
        }
        print(kind, json.dumps(short), flush=True)
        document = {"release": release, "stock": False, "cases": [], "dp_speed": found}
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    _main()
