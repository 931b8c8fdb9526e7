"""How long each stage of a load takes, one after the other."""

from __future__ import annotations

import time


class Stages:
    """A stopwatch. seconds: of the stages that have ended, by name, in their order."""

    def __init__(self) -> None:
        """The first stage begins."""
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        """A stage has ended, and the next one begins."""
        now = time.perf_counter()
        self.seconds[name] = now - self._began
        self._began = now
