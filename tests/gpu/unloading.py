"""An adapter that is unloaded, and deleted, while a request uses it; then another under its name.

Checks of a running server; server.py has it. What the workers have in memory is asked of vLLM's
endpoint for developers (VLLM_SERVER_DEV_MODE=1).
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.workers import Server, on_workers

TOKENS = 400  # of the answer during which the adapter is unloaded: about a second
SETTLE_S = 5.0


def adapters_of_workers(server: Server) -> list[set[int]]:
    """The numbers of the adapters in each worker."""
    held = on_workers(server, "list_loras")
    return [set(map(int, re.findall(r"\d+", str(numbers)))) for numbers in held]


@dataclass(frozen=True)
class NextToken:
    """The likeliest next tokens, and how much of the prompt the prefix cache had."""

    log_probs: dict[str, float]
    cached_tokens: int

    def distance(self, other: "NextToken") -> float:
        """The mean difference of the log-probabilities that both have; 9 if they share none."""
        shared = self.log_probs.keys() & other.log_probs
        differences = [abs(self.log_probs[token] - other.log_probs[token]) for token in shared]
        return sum(differences) / len(differences) if shared else 9.0


def next_token(server: Server, model: str, prompt: Sequence[int]) -> NextToken:
    """Through the prefix cache. The server needs --enable-prompt-tokens-details."""
    status, body = server.post(
        "/v1/completions",
        {
            "model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0,
            "logprobs": 20, "return_tokens_as_token_ids": True,
        },
    )  # fmt: skip
    if status != 200:
        raise RuntimeError(f"{model}: {status} {body[:300]}")
    answer = json.loads(body)
    details = answer["usage"].get("prompt_tokens_details") or {}
    log_probs = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return NextToken(log_probs, details.get("cached_tokens") or 0)


def check_unloading(
    server: Server, first: Path, second: Path, twin: str, prompt: Sequence[int], scratch: Path
) -> list[dict[str, Any]]:
    """first, second: shard directories of two adapters. twin: a served name of the second."""
    path = scratch / "unloaded"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(first, path)
    load = {"lora_name": "reused", "lora_path": str(path)}
    status, _ = server.post("/v1/load_lora_adapter", load)
    before = adapters_of_workers(server)
    old = next_token(server, "reused", prompt)
    answered = _in_background(lambda: _long_answer(server, "reused", prompt))
    time.sleep(0.4)
    unloaded, _ = server.post("/v1/unload_lora_adapter", {"lora_name": "reused"})
    shutil.rmtree(path)
    during = adapters_of_workers(server)
    long_answer = answered()
    after = _settled(server, before)
    lines = [
        {
            "check": "unloaded and deleted while a request uses it",
            "right": (status, unloaded) == (200, 200)
            and during == before
            and long_answer == [200, TOKENS],
            "answer": long_answer, "workers": [sorted(held) for held in during],
        },
        {
            "check": "then it leaves every worker",
            "right": all(len(was - is_now) == 1 for was, is_now in zip(before, after)),
            "workers": [sorted(held) for held in after],
        },
    ]  # fmt: skip
    shutil.copytree(second, path)
    status, _ = server.post("/v1/load_lora_adapter", load)
    new, same, again = (next_token(server, name, prompt) for name in ("reused", twin, "reused"))
    lines.append(
        {
            "check": "another adapter under its name and path gets none of its prefix cache",
            "right": status == 200 and new.cached_tokens == 0 < again.cached_tokens,
            "cached tokens": new.cached_tokens, "cached tokens, asked again": again.cached_tokens,
            "from its own": round(new.distance(same), 4),
            "from the one before": round(new.distance(old), 4),
        }
    )  # fmt: skip
    server.post("/v1/unload_lora_adapter", {"lora_name": "reused"})
    return lines


def _long_answer(server: Server, model: str, prompt: Sequence[int]) -> list[int]:
    status, body = server.post(
        "/v1/completions",
        {
            "model": model, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True,
        },
    )  # fmt: skip
    return [status, json.loads(body)["usage"]["completion_tokens"] if status == 200 else 0]


def _in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Begin a call; what comes back waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def result() -> Any:
        thread.join()
        return results[0] if results else None

    return result


def _settled(server: Server, before: list[set[int]]) -> list[set[int]]:
    """The adapters of each worker, once they are not those from before any more, or in the end."""
    ends = time.monotonic() + SETTLE_S
    while (now := adapters_of_workers(server)) == before and time.monotonic() < ends:
        time.sleep(0.1)
    return now
