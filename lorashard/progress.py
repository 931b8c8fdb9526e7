"""How long work tells of its progress."""

from __future__ import annotations

from collections.abc import Callable

# Called with the number of bytes, or of things, that are done since the last call.
Progress = Callable[[int], None]
