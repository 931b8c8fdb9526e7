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
import http.client
import json
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorashard.adapter.config import CONFIG_NAME
from lorashard.publish.removal import remove_shards
from tests.bench.publish import medians
from tests.bench.trainer_ranks import LORA_RANK, MODEL, Trainer
from tests.gpu.checkpoint import save_tokenizer
from tests.gpu.load_adapters import NUM_EXPERTS, NUM_LAYERS, VOCABULARY, write_model_config
from tests.gpu.server import Server

NUM_REQUESTS, PROMPT_TOKENS, MAX_LEN = 32, 32, 2048
QUIET_S, NUM_LOADS, NUM_VERSIONS = 1.5, 4, 6
TRAINERS = (2, 8)  # ranks
KINDS = ("stock", "plugin")
DEVICES = ("cuda:0", "cuda:1")


def serve_command(model: Path, *, graphs: bool) -> list[str]:
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "dummy"),
        *("-tp", "2", "--enable-expert-parallel", "--enable-lora"),
        *("--max-lora-rank", str(LORA_RANK), "--max-loras", "3", "--max-cpu-loras", "3"),
        *("--served-model-name", "base", "--max-model-len", str(MAX_LEN)),
        *("--max-num-seqs", str(NUM_REQUESTS), "--gpu-memory-utilization", "0.4"),
        *("--kv-cache-memory-bytes", str(2 << 30), "--no-enable-prefix-caching"),
        *(() if graphs else ("--enforce-eager",)),
    ]


class Decoding:
    """Requests that go on until they are stopped, and when each of their tokens came."""

    def __init__(self, url: str, model: str) -> None:
        self.times: list[list[float]] = [[] for _ in range(NUM_REQUESTS)]
        self._stops = threading.Event()
        self._threads = [
            threading.Thread(target=self._decode, args=(url, model, number))
            for number in range(NUM_REQUESTS)
        ]
        for thread in self._threads:
            thread.start()

    def _decode(self, url: str, model: str, number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        body = {
            "model": model, "prompt": [3 + number, *range(10, 9 + PROMPT_TOKENS)], "stream": True,
            "max_tokens": MAX_LEN - PROMPT_TOKENS - 1, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        while not self._stops.is_set() and (line := answer.readline()):
            if line.startswith(b"data: {"):
                self.times[number].append(time.perf_counter())
        connection.close()

    def wait_until_all_run(self) -> None:
        ends = time.monotonic() + 60
        while any(len(times) < 10 for times in self.times):
            if time.monotonic() > ends:
                raise RuntimeError(f"tokens: {[len(times) for times in self.times]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join()

    def gaps(self, begin: float, end: float) -> list[float]:
        """Of all requests, between tokens of which one at least came within the time."""
        return [after - before for before, after in self._pairs(begin, end)]

    def longest(self, begin: float, end: float) -> tuple[float, float]:
        """When the longest of them began and ended, in seconds after `begin`."""
        before, after = max(self._pairs(begin, end), key=lambda pair: pair[1] - pair[0])
        return round(before - begin, 4), round(after - begin, 4)

    def _pairs(self, begin: float, end: float) -> Iterator[tuple[float, float]]:
        for times in self.times:
            yield from (
                (before, after)
                for before, after in pairwise(times)
                if after > begin and before < end
            )


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
    text = log.read_bytes()[begin:].decode(errors="replace")
    return re.findall(r"the engine waited (\d.*?) for what this rank did", text)


def measure_gaps(server: Server, log: Path, running: Path, others: list[Path]) -> dict[str, Any]:
    """running: the adapter of the requests that go on. others: those that are loaded meanwhile."""
    load(server, running)
    begin = log.stat().st_size
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
    # What is ordinary: the second before each load.
    ordinary = [gap for began, _ in loads for gap in decoding.gaps(began - 1.0, began)]
    longest = [max(decoding.gaps(*window)) for window in loads]
    step = statistics.median(ordinary)
    return {
        "step_ms": round(1e3 * step, 2),
        "longest_ordinary_gap_ms": round(1e3 * max(ordinary), 2),
        "longest_gap_at_each_load_ms": [round(1e3 * gap, 2) for gap in longest],
        "longest_gap_from_and_to_s": [decoding.longest(*window) for window in loads],
        "in_steps": round(statistics.median(longest) / step, 1),
        "load_s": [round(ended - began, 4) for began, ended in loads],
        "engine_waits": engine_waits(log, begin),
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
            found = measure_versions(server, trainer, way, folder)
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
