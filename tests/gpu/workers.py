"""A server's workers, called through its endpoint for developers (VLLM_SERVER_DEV_MODE=1)."""

from __future__ import annotations

import json
from typing import Any, Protocol


class Server(Protocol):
    """What is needed of a server: status and body of an answer."""

    def post(self, path: str, document: dict[str, Any]) -> tuple[int, str]: ...


def on_workers(server: Server, method: str, *arguments: Any) -> list[Any]:
    """What a method returns on each worker; of data-parallel engines, on the first one's.

    The endpoint gives lists, dicts and None as they are, and anything else as text. Raises RuntimeError.
    """
    status, body = server.post("/collective_rpc", {"method": method, "args": list(arguments)})
    if status != 200:
        raise RuntimeError(f"/collective_rpc {method}: {status} {body[:300]}")
    results: list[Any] = json.loads(body)["results"]
    return results
