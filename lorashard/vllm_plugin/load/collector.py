"""Python's garbage collector, kept out of a load.

The header and the plan of a plain adapter are some 100,000 small objects without cycles, gone when
the load ends. They make the collector look through everything that the worker holds, vLLM and torch
included: 0.4 s in every second or third load of 6,144 tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """No collection starts by itself within the block. After it all is as before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
