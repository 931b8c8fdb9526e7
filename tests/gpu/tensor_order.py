"""Tensors on a GPU are read once they are made, in whatever thread: `python -m tests.gpu.tensor_order`.

One GPU. Adapters in memory come from whatever stream the caller is on, and the plugin's threads read
them on streams of their own. Here a tensor is filled behind a second of work, as vLLM's workers and
trainers queue theirs, and read at once.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from lorashard.adapter.tensor_file import TensorFile

SIZE = 2**20
BUSY_CYCLES = 2_000_000_000  # about a second


def too_early(stream: torch.cuda.Stream) -> int:
    """How many bytes are read that the stream was yet to write."""
    with torch.cuda.stream(stream):
        tensor = torch.ones(SIZE, dtype=torch.uint8, device="cuda")
        stream.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        tensor.fill_(2)
        file = TensorFile("memory", {"a": tensor})
        with ThreadPoolExecutor(1) as threads:
            read = threads.submit(file.read, len(file.header), file.size_bytes).result()
    return SIZE - read.count(2)


def main() -> int:
    """Print what was found; 1 if anything is wrong."""
    streams = {"its own": torch.cuda.Stream(), "the default one": torch.cuda.default_stream()}
    found = {name: too_early(stream) for name, stream in streams.items()}
    for name, count in found.items():
        print(f"bytes read before they were written, on {name}: {count} of {SIZE}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
