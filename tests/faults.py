"""Faults that the servers on loopback produce on demand: which one applies to which request."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol


class IncomingRequest(Protocol):
    """What faults need to know of a request. ranged: the bytes [begin, end) that it asks for."""

    method: str
    path: str
    ranged: tuple[int, int] | None


@dataclass
class Fault:
    """Applies to requests whose path contains `match`: after `skip` of them, `times` times or always."""

    kind: str
    match: str
    value: Any
    times: int | None = 1
    skip: int = 0
    method: str | None = "GET"
    beyond: int = 0  # only to requests for bytes from here on


class Faults:
    """All faults of one server. Thread-safe."""

    def __init__(self) -> None:
        self._laid: list[Fault] = []
        self._lock = threading.Lock()

    def lay(self, fault: Fault) -> None:
        with self._lock:
            self._laid.append(fault)

    def mend(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._laid.clear()

    def due(self, kind: str, request: IncomingRequest) -> Any:
        """The value of a fault that applies now; True if it has no value, None if none applies."""
        with self._lock:
            for fault in self._laid:
                if fault.kind != kind or fault.match not in request.path or fault.times == 0:
                    continue
                if fault.method not in (None, request.method):
                    continue
                if fault.beyond and (request.ranged or (0, 0))[0] < fault.beyond:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return True if fault.value is None else fault.value
        return None
