"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# Called with how much is done since the last call: bytes, or whole items.
Progress = Callable[[int], None]

# Called as a stage of the work begins, with its name and the bytes that it is going to report.
Stage = Callable[[str, int], None]
