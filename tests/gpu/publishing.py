"""From a trainer's GPUs to a server's answers, and what running requests notice: stock beside the plugin.

    python -m tests.gpu.publishing --work DIR --out FILE

Trainer and server share two GPUs. The adapter has GLM-4.5-Air's shapes with 8 MoE layers (1.1 GB); the
model's weights are dummies, so answers are not judged here. Two measurements for each kind of server:
the gaps between the tokens of 32 running requests while another adapter is loaded, and the seconds
from a version on the trainer's ranks to the first token with it. With the plugin the ranks write
shards; with stock vLLM rank 0 gathers and saves one file. The servers run at the same time, the
measurements one after another.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME
from lorashard.publish.removal import remove_shards
from tests.bench.publish import medians
from tests.bench.trainer_ranks import LORA_RANK, MODEL, Trainer
from tests.gpu.checkpoint import save_tokenizer
from tests.gpu.load_adapters import NUM_EXPERTS, NUM_LAYERS, VOCABULARY, write_model_config
from tests.gpu.server import Server
from tests.gpu.throughput import EXTENSION, recorded_steps
from tests.gpu.token_gaps import MAX_LEN, NUM_REQUESTS, Decoding, gaps_at
from tests.gpu.workers import on_workers

QUIET_S, NUM_LOADS, NUM_VERSIONS = 1.5, 4, 6
TRAINERS = (2, 8)  # ranks
KINDS = ("stock", "plugin")
DEVICES = ("cuda:0", "cuda:1")


def serve_command(model: Path, *, graphs: bool, extension: Sequence[str] = EXTENSION) -> list[str]:
    """Arguments of Python. extension: options for methods of the workers."""
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "dummy"),
        *("-tp", "2", "--enable-expert-parallel", "--enable-lora"),
        *("--max-lora-rank", str(LORA_RANK), "--max-loras", "3", "--max-cpu-loras", "3"),
        *("--served-model-name", "base", "--max-model-len", str(MAX_LEN)),
        *("--max-num-seqs", str(NUM_REQUESTS), "--gpu-memory-utilization", "0.4"),
        *("--kv-cache-memory-bytes", str(6 << 30), "--no-enable-prefix-caching", *extension),
        *(() if graphs else ("--enforce-eager",)),
    ]


def load(server: Server, path: Path) -> None:
    """By the endpoint. Raises RuntimeError."""
    status, body = server.post(
        "/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)}
    )
    if status != 200:
        raise RuntimeError(f"{path}: {status} {body[:500]}")


def unload(server: Server, path: Path) -> None:
    server.post("/v1/unload_lora_adapter", {"lora_name": path.name})


def first_token(server: Server, name: str) -> None:
    status, body = server.post(
        "/v1/completions",
        {"model": name, "prompt": [3, 4, 5], "max_tokens": 1},
    )
    if status != 200:
        raise RuntimeError(f"{name}: {status} {body[:500]}")


def engine_waits(log: Path, begin: int) -> list[str]:
    """What the plugin said of each load, from byte `begin` of the server's log on: of what the engine
    waited for, in ms, by rank.
    """
    return _logged(log, begin, r"the engine waited (\d.*?) for what this rank did")


def load_stages(log: Path, begin: int) -> list[str]:
    """The same of how long each stage of a load took."""
    return _logged(log, begin, r"GB/s \(ms: (.*?)\)")


def _logged(log: Path, begin: int, pattern: str) -> list[str]:
    return re.findall(pattern, log.read_bytes()[begin:].decode(errors="replace"))


def measure_gaps(server: Server, log: Path, running: Path, others: list[Path]) -> dict[str, Any]:
    """running: the adapter of the requests that go on. others: those that are loaded meanwhile.

    The gaps between tokens as the client has them, and under `steps` those between the begins of steps
    on the first rank, without what the way to the client and its many threads add.
    """
    load(server, running)
    begin = log.stat().st_size
    on_workers(server, "record_steps")
    decoding = Decoding(server.url, running.name)
    loads = []
    try:
        decoding.wait_until_all_run()
        time.sleep(QUIET_S)
        for number in range(NUM_LOADS):
            path = others[number % len(others)]
            began = time.perf_counter()
            load(server, path)
            loads.append((began, time.perf_counter()))
            time.sleep(QUIET_S)
            unload(server, path)
            time.sleep(QUIET_S)
    finally:
        decoding.stop()
    unload(server, running)
    steps = [step.began_s for step in recorded_steps(server)[0]]
    return {
        **gaps_at(decoding.times, loads),
        "steps": gaps_at([steps], loads),
        "load_s": [round(ended - began, 4) for began, ended in loads],
        "engine_waits": engine_waits(log, begin),
        "load_stages": load_stages(log, begin),
    }


def measure_versions(server: Server, trainer: Trainer, way: str, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, for the versions after the first, which makes plans and pins memory.

    They are written to the files of the one before, as `Publisher` leaves them. rounds_s: what the
    slowest rank took for each round of the writer's commit.
    """
    rows, rounds = [], []
    for version in range(NUM_VERSIONS):
        path = folder / f"v{version}"
        trainer.run("train")
        began = time.perf_counter()
        trainer.run(way, path, ep_size=2)
        rounds.append(trainer.rounds)
        written = time.perf_counter()
        load(server, path)
        loaded = time.perf_counter()
        first_token(server, path.name)
        answered = time.perf_counter()
        rows.append([written - began, loaded - written, answered - loaded, answered - began])
        unload(server, path)
        if remove_shards(path, as_spare=True) is not None:  # a plain adapter
            shutil.rmtree(path)
    names = ("write_s", "load_s", "answer_s", "total_s")
    typical = map(statistics.median, zip(*rows[1:]))
    return {
        **{name: round(value, 4) for name, value in zip(names, typical)},
        "rounds_s": medians(rounds[1:]),
        "all": [[round(value, 4) for value in row] for row in rows],
    }


def is_what_split_writes(folder: Path, devices: tuple[str, ...] = DEVICES) -> bool:
    """Whether tensors on these devices become the bytes that `split` makes of the gathered adapter.

    Versions after the first are written to the files of the one before.
    """
    from lorashard import SplitRequest, split_adapter

    model = folder / "model.json"
    model.write_text(json.dumps(MODEL))
    with closing(Trainer(2, 1, devices)) as trainer:
        for version in range(3):
            written, gathered, split = (folder / f"{name}{version}" for name in "wgs")
            trainer.run("train")
            trainer.run("write", written, ep_size=2)
            trainer.run("gather", gathered)
            # The same settings, in the writer's form.
            shutil.copy(written / CONFIG_NAME, gathered / CONFIG_NAME)
            split_adapter(gathered, split, SplitRequest(2, model=str(model)))
            files = [
                {path.name: path.read_bytes() for path in place.iterdir()}
                for place in (written, split)
            ]
            if files[0] != files[1]:
                return False
            remove_shards(written, as_spare=True)
    return True


def _measure_kind(
    kind: str, server: Server, log: Path, folder: Path, document: dict[str, Any]
) -> None:
    way = "write" if kind == "plugin" else "gather"
    for num_ranks in TRAINERS:
        with closing(Trainer(num_ranks, NUM_LAYERS - 1, DEVICES)) as trainer:
            if num_ranks == TRAINERS[0]:
                paths = [folder / f"a{number}" for number in range(3)]
                for path in paths:
                    trainer.run(way, path, ep_size=2)
                    trainer.run("train")
                document["while requests run"] = measure_gaps(server, log, paths[0], paths[1:])
                print("RESULT", kind, json.dumps(document), flush=True)
            begin = log.stat().st_size
            found = measure_versions(server, trainer, way, folder)
            found["load_stages"] = load_stages(log, begin)
            document[f"{num_ranks} trainer ranks"] = found
            print("RESULT", kind, num_ranks, json.dumps(found), flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.publishing")
    parser.add_argument("--work", type=Path, required=True, help="in /dev/shm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    args = parser.parse_args()
    work = args.work.absolute() / "publishing"
    work.mkdir(parents=True, exist_ok=True)
    write_model_config(work, NUM_EXPERTS)
    save_tokenizer(work / "model", VOCABULARY)
    document: dict[str, Any] = {"graphs": not args.eager}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        document["is_what_split_writes"] = is_what_split_writes(Path(folder))
    logs = {kind: args.out.parent.absolute() / kind / "vllm-serve.log" for kind in args.kinds}
    servers = {
        kind: Server(
            serve_command(work / "model", graphs=not args.eager),
            logs[kind],
            stock=kind == "stock",
        )
        for kind in args.kinds
    }
    try:
        for kind, server in servers.items():
            document[kind] = {"started_s": round(server.wait(), 1)}
        for kind, server in servers.items():
            folder = work / kind
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                _measure_kind(kind, server, logs[kind], folder, document[kind])
            except (RuntimeError, OSError) as err:
                document[kind]["failure"] = str(err)[:1000]
                print("RESULT", kind, document[kind]["failure"], flush=True)
            args.out.write_text(json.dumps(document, indent=1))
    except RuntimeError as err:
        print("RESULT", err, flush=True)
    finally:
        for server in servers.values():
            server.end()


if __name__ == "__main__":
    _main()
