"""Stands in for the HTTP endpoints of vLLM that lorashard and docs/recipes/rl_swaps.py use; no vLLM, no model.

    python -m tests.lora_endpoints [FAULT]      prints its port

Its log-probabilities depend on the bytes of the adapter that was loaded under a name, so the
script's own judgement can be tested. FAULT: `stale` keeps the weights of the fourth version, `cache`
answers from the version before where the prompt's log-probabilities are not asked for, `leak` keeps
a megabyte for each load. tests/gpu/swaps.py runs the script against a real vLLM.

    with Endpoints().running() as server:
        server.refused.add("policy-v00002")      does not load it
        server.silent.add("policy-v00002")       loads it, and has no answer for it
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

LEAKED_BYTES = 2**20


class Endpoints(ThreadingHTTPServer):
    """What is loaded, and all that happened: `loaded NAME`, `unloaded NAME`.

    requests: path and adapter of each. api_key: what each must name. gate: passed by every load
    before it begins. hung_up: paths that get no answer. nonsense: the answer to every GET.
    """

    daemon_threads = True

    def __init__(self, fault: str = "", *, port: int = 0, api_key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fault, self.api_key = fault, api_key
        self.refused: set[str] = set()
        self.silent: set[str] = set()
        self.hung_up: set[str] = set()
        self.redirected_to = self.nonsense = ""
        self.requests: list[str] = []
        self.gate: threading.Barrier | None = None
        self.paths: dict[str, str] = {}
        self.events: list[str] = []
        self.loaded: dict[str, float] = {}
        self.weights: list[float] = []  # of every load so far
        self.leaked: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[Endpoints]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """Also a second time."""
        self.shutdown()
        self.server_close()

    def load(self, name: str, path: str) -> tuple[int, Any]:
        if self.gate is not None:
            self.gate.wait()
        if name in self.loaded:
            return 400, _error(400, f"The lora adapter '{name}' has already been loaded.")
        if name in self.refused:
            return 500, _error(500, f"{name} is not for this server.")
        self.paths[name] = path
        self.weights.append(_weights_in(Path(path)))
        if self.fault == "leak":
            self.leaked.append(b"x" * LEAKED_BYTES)
        stale = self.fault == "stale" and len(self.weights) > 4
        self.loaded[name] = self.weights[3 if stale else -1]
        self.events.append(f"loaded {name}")
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        if name not in self.loaded:
            return 404, _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        self.events.append(f"unloaded {name}")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, question: dict[str, Any]) -> tuple[int, Any]:
        if question["model"] not in self.loaded:
            return 404, _error(404, f"The model `{question['model']}` does not exist.")
        if question["model"] in self.silent:
            return 500, _error(500, "The engine is dead.")
        weights = self.loaded[question["model"]]
        if self.fault == "cache" and "prompt_logprobs" not in question:
            weights = self.weights[max(0, len(self.weights) - 2)]
        prompts = (
            question["prompt"] if isinstance(question["prompt"][0], list) else [question["prompt"]]
        )
        choices = [_choice(n, p, weights, question) for n, p in enumerate(prompts)]
        return 200, {"choices": choices}

    def models(self) -> tuple[int, Any]:
        cards = [{"id": name, "root": self.paths[name]} for name in self.loaded]
        return 200, {"object": "list", "data": [{"id": "base", "root": "some/model"}, *cards]}


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "any", "param": None, "code": status}}


def _weights_in(adapter: Path) -> float:
    """A number that changes with lora_B, whichever way the adapter is laid out."""
    files = [load_file(path) for path in sorted(adapter.glob("*.safetensors"))]
    return float(
        sum(t.double().abs().sum() + t.double().flatten()[0]
            for tensors in files for name, t in sorted(tensors.items()) if "lora_B" in name)
    )  # fmt: skip


def _choice(n: int, prompt: list[int], weights: float, question: dict[str, Any]) -> dict[str, Any]:
    def log_prob(token: int, place: int) -> float:
        return -3 * abs(math.sin(token + 0.1 * place + weights))

    likeliest = {
        f"token_id:{t}": log_prob(t, len(prompt)) for t in range(question.get("logprobs", 0))
    }
    choice: dict[str, Any] = {"index": n, "logprobs": {"top_logprobs": [likeliest]}}
    if "prompt_logprobs" in question:
        told = [{str(t): {"logprob": log_prob(t, i)}} for i, t in enumerate(prompt)]
        choice["prompt_logprobs"] = [None, *told[1:]]
    return choice


class _Handler(BaseHTTPRequestHandler):
    server: Endpoints

    def do_GET(self) -> None:
        if not self._goes_on(""):
            return
        if self.server.nonsense:
            self._answer(200, self.server.nonsense)
            return
        if self.path == "/v1/models":
            self._answer(*self.server.models())
            return
        events = json.dumps(self.server.events)
        self._answer(200, 'vllm:prefix_cache_hits_total{engine="0"} 0.0\n'
                     if self.path == "/metrics" else events)  # fmt: skip

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._goes_on(asked.get("lora_name") or asked.get("model") or ""):
            return
        if self.path == "/tokenize":
            status, answer = 200, {"tokens": list(asked["prompt"].encode())}
        elif self.path == "/v1/load_lora_adapter":
            status, answer = self.server.load(asked["lora_name"], asked["lora_path"])
        elif self.path == "/v1/unload_lora_adapter":
            status, answer = self.server.unload(asked["lora_name"])
        else:
            status, answer = self.server.complete(asked)
        self._answer(status, answer)

    def _goes_on(self, adapter: str) -> bool:
        """Whether nothing keeps the server from doing what it is asked."""
        server, key = self.server, self.server.api_key
        server.requests.append(f"{self.path} {adapter}".strip())
        if self.path in server.hung_up:
            self.close_connection = True
        elif server.redirected_to:
            self._answer(307, "", Location=server.redirected_to + self.path)
        elif key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            self._answer(401, {"error": "Unauthorized"})
        else:
            return True
        return False

    def _answer(self, status: int, answer: Any, **headers: str) -> None:
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    endpoints = Endpoints(sys.argv[1] if len(sys.argv) > 1 else "")
    print(endpoints.server_port, flush=True)
    endpoints.serve_forever()
