"""What the servers on loopback do wrong on request: which fault is due for which request."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol


class Asked(Protocol):
    """A request as far as faults look at it. ranged: the bytes [begin, end) that are asked for."""

    method: str
    path: str
    ranged: tuple[int, int] | None


@dataclass
class Fault:
    """Laid on requests whose path holds `match`, after `skip` of them, `times` times or always."""

    kind: str
    match: str
    value: Any
    times: int | None = 1
    skip: int = 0
    method: str | None = "GET"
    beyond: int = 0  # only where bytes from here on are asked for


class Faults:
    """All that are laid on one server; several threads may ask."""

    def __init__(self) -> None:
        self._laid: list[Fault] = []
        self._lock = threading.Lock()

    def lay(self, fault: Fault) -> None:
        with self._lock:
            self._laid.append(fault)

    def mend(self) -> None:
        """Take all faults away."""
        with self._lock:
            self._laid.clear()

    def due(self, kind: str, request: Asked) -> Any:
        """The value of a fault that is due now, or None; True for one without a value."""
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
