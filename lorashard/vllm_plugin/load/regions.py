"""Host memory that adapters are read into: pinned once and reused by the next adapter.

In: a size. Out: a numpy array on a region of the pool, which is free again once nothing refers to
the array any more. With fresh memory, page faults and registering the pages with CUDA take longer
than reading the bytes, so a region outlives its adapter. PyTorch's own pinned allocator rounds
every block up to a power of two (lorashard/inspect/memory.py has the figures), so it is not used.
"""

from __future__ import annotations

import gc
import logging
import mmap
import threading
import weakref
from collections.abc import Collection
from concurrent.futures import Executor
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from lorashard.storage.buffers import allocate_shared

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

_GRAIN = 2 * 2**20  # sizes are multiples of a huge page
_TOUCH_STEP = 32 * 2**20  # bytes that one thread faults in at once

logger = logging.getLogger("vllm.lorashard")


class Region:
    """Anonymous memory of a fixed size, registered with CUDA if the engine runs on it."""

    def __init__(self, size: int, device: Any, threads: Executor) -> None:
        import numpy as np

        self._memory: mmap.mmap = allocate_shared(max(_GRAIN, -(-size // _GRAIN) * _GRAIN))
        self.bytes: Bytes = np.frombuffer(self._memory, np.uint8)
        pages = [self.bytes[at : at + _TOUCH_STEP] for at in range(0, self.size, _TOUCH_STEP)]
        list(threads.map(_touch, pages))
        self.is_pinned = device.type == "cuda" and _register(self.bytes)
        self.is_leased = False
        self.has_pool = True  # False: nobody would take it again, so it goes with its lease
        self._in_use: list[Any] = []
        self._going = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._memory)

    def mark_used(self, streams: Collection[Any]) -> None:
        """Copies may be in flight on these CUDA streams: `wait` waits for those issued up to now."""
        if self.is_pinned:
            self._in_use = [stream.record_event() for stream in streams]

    def wait(self) -> None:
        """Return once no copy to the device reads this memory."""
        for event in self._in_use:
            event.synchronize()
        self._in_use = []

    def free(self) -> None:
        """Unregister and unmap the memory. Nothing may refer to it any more. Once is enough."""
        if not self._going.acquire(blocking=False):
            return
        self.wait()
        if self.is_pinned:
            import torch

            cudart: Any = torch.cuda.cudart  # untyped in torch
            cudart().cudaHostUnregister(self.bytes.ctypes.data)
            self.is_pinned = False
        del self.bytes
        with suppress(BufferError):  # an array on it is just going: the memory goes with that
            self._memory.close()


class RegionPool:
    """At most `limit` regions, unless more are in use at once.

    A region comes back by itself once the last tensor on it is gone. When the pool is gone, its
    regions are unregistered and unmapped, those in use as soon as they come back. So a second
    engine in the process can register the same addresses.
    """

    def __init__(self, limit: int, device: Any, threads: Executor) -> None:
        self._limit = limit
        self._device = device
        self._threads = threads
        self._regions: list[Region] = []
        self._lock = threading.Lock()
        self._closing = weakref.finalize(self, _free_all, self._regions)
        self._closing.atexit = False

    def warm(self, count: int, size: int) -> None:
        """Make regions of `size` bytes until `count` are free or in use."""
        with self._lock:
            missing = min(count, self._limit) - len(self._regions)
            self._regions.extend(
                Region(size, self._device, self._threads) for _ in range(max(0, missing))
            )

    def take(self, size: int) -> Bytes:
        """`size` bytes of a region, with any content.

        The region is in use until the array, its slices, memoryviews and tensors are all gone.
        `numpy.asarray` of the array does not keep it in use.
        """
        with self._lock:
            region = self._fitting(size)
            if region is None:
                self._make_room()
                region = Region(size, self._device, self._threads)
                self._regions.append(region)
            region.wait()
            # The base of a numpy view is the array that owns the memory, except that it stops at an
            # array of another type. So only a subclass makes every view of the lease keep the lease.
            lease: Bytes = region.bytes[:size].view(_lease_type())
            # Whatever thread collects the lease has streams of its own, and may be on another device.
            streams = _streams(self._device) if region.is_pinned else ()
            finalizer = weakref.finalize(lease, _give_back, region, streams)
            finalizer.atexit = False
            region.is_leased = True  # last: from here on the lease's end makes it free
        return lease

    def sizes(self) -> tuple[int, ...]:
        """The size in bytes of each region that is free now."""
        with self._lock:
            return tuple(region.size for region in self._free())

    def close(self) -> None:
        """Unregister and unmap the regions, as when the pool is gone. Nothing may be taken any more."""
        self._closing()

    def _free(self) -> list[Region]:
        return [region for region in self._regions if not region.is_leased]

    def _fitting(self, size: int) -> Region | None:
        """The smallest free region that is large enough."""
        fitting = (region for region in self._free() if region.size >= size)
        return min(fitting, key=lambda region: region.size, default=None)

    def _make_room(self) -> None:
        """Unmap free regions, smallest first, so that a new one stays within the limit."""
        if len(self._regions) >= self._limit and not self._free():
            gc.collect(0)  # the traceback of a failed load may still refer to its region
        for region in sorted(self._free(), key=lambda region: region.size):
            if len(self._regions) >= self._limit:
                self._regions.remove(region)
                region.free()


@cache
def _lease_type() -> Any:
    import numpy as np

    return type("Lease", (np.ndarray,), {})


def _streams(device: Any) -> Collection[Any]:
    """The streams of a device on which this thread's copies may be issued."""
    import torch

    return {torch.cuda.current_stream(device), torch.cuda.default_stream(device)}


def _give_back(region: Region, streams: Collection[Any]) -> None:
    """At any moment and in any thread: what a lease's finalizer does."""
    try:
        region.mark_used(streams)
    finally:
        region.is_leased = False
    if not region.has_pool:
        region.free()


def _free_all(regions: list[Region]) -> None:
    for region in regions:
        region.has_pool = False
        if not region.is_leased:
            region.free()
    regions.clear()


def _touch(pages: Bytes) -> None:
    pages[:: mmap.PAGESIZE] = 0


def _register(pages: Bytes) -> bool:
    """Pin the pages for copies to every device of this process. False where CUDA refuses."""
    import torch

    portable = 1  # cudaHostRegisterPortable
    cudart: Any = torch.cuda.cudart  # untyped in torch
    code = cudart().cudaHostRegister(pages.ctypes.data, len(pages), portable)
    if int(code) != 0:
        logger.warning(
            "lorashard: cudaHostRegister of %.2f GB failed (error %d), so adapters are read into "
            "pageable memory, which is slower. Is the locked-memory limit (ulimit -l) too low?",
            len(pages) / 1e9,
            int(code),
        )
    return int(code) == 0
