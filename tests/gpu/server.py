"""A real `vllm serve` with four adapters, spoken to over HTTP; then damaged shard directories.

python -m tests.gpu.server --work DIR --out FILE
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.cases import CASES
from tests.gpu.engine import Expected
from tests.gpu.processes import child_environment, end, start
from tests.gpu.unloading import check_unloading

# Served name -> adapter of glm16; each is a shard directory.
ADAPTERS = {"a": "e0", "b": "e1", "c": "fused0", "d": "rs"}
START_LIMIT_S = 270.0
RANK_FILES = ("ep-00000-of-00002.safetensors", "ep-00001-of-00002.safetensors")


# What a small model needs of a GPU, and the base model's name.
SMALL = (
    *("--served-model-name", "base", "--max-model-len", "512", "--max-num-seqs", "16"),
    *("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 30)),
    "--enable-prompt-tokens-details",
)


class Server:
    """The process and its HTTP interface."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        stock: bool = False,
        port: int = 0,
        cpus: Collection[int] = (),
    ) -> None:
        """arguments: of Python, all but host and port. stock: without the plugin. port: 0 = a free one.

        cpus: that it may use; all if none are given.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            self._port = int(probe.getsockname()[1])
        metrics = log.parent / "prometheus"
        shutil.rmtree(metrics, ignore_errors=True)
        metrics.mkdir(parents=True)
        environment = child_environment(
            stock=stock,
            changes={
                "PROMETHEUS_MULTIPROC_DIR": str(metrics),
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_SERVER_DEV_MODE": "1",
            },
        )
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        self._process = start([*arguments, *where], log, environment, cpus)

    def wait(self) -> float:
        """Seconds until it answers. Raises RuntimeError if it ends or takes too long."""
        began = time.monotonic()
        while time.monotonic() - began < START_LIMIT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            try:
                if self.get("/health")[0] == 200:
                    return time.monotonic() - began
            except OSError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server did not answer within {START_LIMIT_S} s")

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        return self._call(urllib.request.Request(self.url + path))

    def post(
        self, path: str, document: dict[str, Any], engine: int | None = None
    ) -> tuple[int, str]:
        """Status and body. engine: the data-parallel rank that is to answer."""
        headers = {"Content-Type": "application/json"}
        if engine is not None:
            headers["X-data-parallel-rank"] = str(engine)
        return self._call(
            urllib.request.Request(
                self.url + path, data=json.dumps(document).encode(), headers=headers
            )
        )

    @staticmethod
    def _call(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as err:
            return err.code, err.read().decode()

    def log_probs(self, name: str, prompts: Tensor, engine: int | None = None) -> Tensor:
        """Prompt log-probabilities of a served model or adapter. Raises RuntimeError."""
        status, body = self.post(
            "/v1/completions",
            {
                "model": name,
                "prompt": prompts.tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 1,
            },
            engine,
        )
        if status != 200:
            raise RuntimeError(f"{name}: {status} {body[:500]}")
        choices = sorted(json.loads(body)["choices"], key=lambda choice: int(choice["index"]))
        return torch.tensor(
            [
                [
                    answered[place][str(int(token))]["logprob"]
                    for place, token in enumerate(prompt)
                    if place > 0
                ]
                for prompt, answered in zip(
                    prompts, (choice["prompt_logprobs"] for choice in choices)
                )
            ]
        )

    def end(self) -> None:
        """Workers included."""
        end(self._process)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """For its status."""
        return self._process


def serve_command(
    model: Path, shards: Callable[[str], Path], adapters: Mapping[str, str] = ADAPTERS
) -> list[str]:
    """The command of the README, with what makes a small model start fast."""
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("-tp", "2", "--enable-expert-parallel", "--enable-lora", "--fully-sharded-loras"),
        *("--max-lora-rank", "32", "--max-loras", "4", "--max-cpu-loras", "4"),
        "--lora-modules",
        *(f"{name}={shards(adapter)}" for name, adapter in adapters.items()),
        *SMALL,
    ]


def damage(source: Path, target: Path, how: str) -> None:
    """A copy of a shard directory with one fault."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    first, second = (target / name for name in RANK_FILES)
    if how == "truncated":
        os.truncate(second, second.stat().st_size // 2)
    elif how == "swapped":
        spare = target / "spare"
        first.rename(spare)
        second.rename(first)
        spare.rename(second)
    elif how == "missing":
        second.unlink()


class Session:
    """The checks, in order; each leaves one line."""

    def __init__(self, server: Server, expected: Expected, shards: Callable[[str], Path]) -> None:
        self._server, self._expected, self._shards = server, expected, shards
        self._base = server.log_probs("base", expected.prompts)
        self.lines: list[dict[str, Any]] = []

    def _report(self, check: str, right: bool, **more: Any) -> None:
        self.lines.append({"check": check, "right": right, **more})
        print("RESULT", json.dumps(self.lines[-1]), flush=True)

    def answers(self, served: str, adapter: str, check: str) -> None:
        """A served adapter answers as the reference, and not as the base model."""
        try:
            got = self._server.log_probs(served, self._expected.prompts)
        except (RuntimeError, OSError) as err:
            self._report(check, right=False, failure=str(err)[:500])
            return
        line = self._expected.judge(adapter, got, self._base)
        changed = (got - self._base).abs().mean().item()
        line["right"] = line["right"] and changed > 0.1
        self._report(check, changed=round(changed, 4), **line)

    def load_and_unload(self) -> None:
        """POST /v1/load_lora_adapter, use it, unload it: then it is unknown."""
        path = str(self._shards("e2"))
        status, body = self._server.post(
            "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": path}
        )
        self._report("load at run time", status == 200, status=status, body=body[:300])
        self.answers("late", "e2", "adapter loaded at run time")
        status, _ = self._server.post("/v1/unload_lora_adapter", {"lora_name": "late"})
        self._report("unload", status == 200, status=status)
        status, _ = self._server.post(
            "/v1/completions", {"model": "late", "prompt": [5, 6, 7], "max_tokens": 1}
        )
        self._report("unloaded adapter is unknown", status == 404, status=status)

    def unload_in_use(self, scratch: Path) -> None:
        """See unloading.py."""
        try:
            lines = check_unloading(
                self._server,
                self._shards("e2"), self._shards(ADAPTERS["a"]), "a",
                self._expected.prompts[0].tolist(), scratch,
            )  # fmt: skip
        except (RuntimeError, OSError) as err:
            lines = [{"check": "unloading", "right": False, "failure": str(err)[:500]}]
        for line in lines:
            self._report(line.pop("check"), line.pop("right"), **line)

    def damaged(self, how: str, directory: Path) -> None:
        """The request fails and names the file; the engine lives and still answers right."""
        path = directory / f"damaged-{how}"
        damage(self._shards("e2"), path, how)
        status, body = self._server.post(
            "/v1/load_lora_adapter", {"lora_name": how, "lora_path": str(path)}
        )
        named = any(name in body for name in RANK_FILES)
        self._report(f"{how} rank file", status >= 400 and named, status=status, body=body[:600])
        self._report(f"health after {how}", self._server.get("/health")[0] == 200)
        self.answers("a", ADAPTERS["a"], f"adapter after {how}")

    def metrics(self) -> None:
        """/metrics has ours."""
        _, body = self._server.get("/metrics")
        ours = [line for line in body.splitlines() if line.startswith("lorashard_")]
        self._report("metrics", bool(ours), lines=ours[:12])


def run_session(
    server: Server, expected: Expected, shards: Callable[[str], Path], scratch: Path
) -> list[dict[str, Any]]:
    """All checks against a server that answers."""
    session = Session(server, expected, shards)
    for served, adapter in ADAPTERS.items():
        session.answers(served, adapter, f"adapter {served} ({adapter})")
    session.load_and_unload()
    session.unload_in_use(scratch)
    for how in ("truncated", "swapped", "missing"):
        session.damaged(how, scratch)
    for served, adapter in ADAPTERS.items():
        session.answers(served, adapter, f"adapter {served} ({adapter}) at the end")
    session.metrics()
    return session.lines


def write_checks(document: dict[str, Any], out: Path) -> None:
    """The document of a session, and whether all of it was as expected."""
    checks = document["checks"]
    document["as_expected"] = (
        bool(checks) and "failure" not in document and all(check["right"] for check in checks)
    )
    out.write_text(json.dumps(document, indent=1))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.server")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    case = next(c for c in CASES if c.name == "glm16-fp8")
    directory = args.work / "models" / "glm16"

    def shards(adapter: str) -> Path:
        return Path(directory / f"{adapter}.shards")

    log = args.out.with_name("vllm-serve.log")
    server = Server(serve_command(directory / "model_fp8", shards), log)
    document: dict[str, Any] = {"checks": []}
    try:
        document["started"] = round(server.wait(), 1)
        document["checks"] = run_session(
            server, Expected.load(args.work, case), shards, args.out.parent
        )
    except (RuntimeError, OSError) as err:
        document["failure"] = str(err)[:1000]
    finally:
        server.end()
    write_checks(document, args.out)


if __name__ == "__main__":
    _main()
