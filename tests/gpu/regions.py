"""Copies from a pool's memory are waited for, whichever thread collects: `python -m tests.gpu.regions`.

Two GPUs. A copy to the second one is queued behind a second of work; then another thread, whose
device is the first GPU, collects the tensor that it reads. The memory must not be handed out again
before the copy is done, and no CUDA context may appear on the first GPU.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from lorashard.vllm_plugin.load.regions import RegionPool

SIZE = 2**30
BUSY_CYCLES = 2_000_000_000  # about a second


def gpus_in_use() -> set[str]:
    """The UUIDs of the GPUs on which this process has a context."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.split(", ") for line in lines]
    return {uuid for pid, uuid in pairs if pid == str(os.getpid())}


def main() -> int:
    """Print what was found; 1 if anything is wrong."""
    torch.cuda.set_device(1)
    device = torch.device("cuda", 1)
    copied = torch.empty(SIZE, dtype=torch.uint8, device=device)
    before = gpus_in_use()
    pool = RegionPool(3, device, ThreadPoolExecutor(2))
    stream = torch.cuda.Stream(device)
    overwritten = 0
    for on_stream in (torch.cuda.default_stream(device), stream):
        with torch.cuda.stream(on_stream):
            lease = pool.take(SIZE)
            lease[:] = 1
            tensor = torch.from_numpy(lease)
            torch.cuda._sleep(BUSY_CYCLES)
            copied.copy_(tensor, non_blocking=True)
            cycle: list[object] = [lease, tensor]
            cycle.append(cycle)
            del lease, tensor, cycle
            collecting = threading.Thread(target=gc.collect)
            collecting.start()
            collecting.join()
            again = pool.take(SIZE)
            again[:] = 2
            torch.cuda.synchronize(1)
            overwritten += int((copied == 2).sum())
            del again
    pool.close()
    after = gpus_in_use()
    print(f"bytes overwritten while they were copied: {overwritten} of {2 * SIZE}")
    print(f"contexts before: {len(before)}, after: {len(after)}")
    return int(overwritten > 0 or before != after)


if __name__ == "__main__":
    sys.exit(main())
