"""A copy on the device of what was read of an adapter, until the adapter is in its slot.

In: a region of host memory that is filled from front to back. Out: the same bytes on the device. A
thread that reads an adapter ahead makes it meanwhile, on a CUDA stream of its own, so that the
engine, which no request can pass while an adapter goes into its slot, copies within the device only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a step copies to the device goes between two of these; behind a whole layer it would wait for long.
PIECE_BYTES = 4 << 20
_SHARE = 4  # at most a quarter of what is free on the device is taken, and only for this moment


class ExpertsOnDevice:
    """The experts of a LoRAModel on the device, to be taken from there as they go into their slot.

    What the model keeps for later is in host memory.
    """

    def __init__(self, model: Any, experts: Mapping[str, Any]) -> None:
        """experts: vLLM's PackedLoRALayerWeights by layer, equal to those of the model."""
        self._model = model
        self._on_device = experts
        self._on_host = {name: model.loras[name] for name in experts}

    def enter(self, model: Any) -> None:
        """Put them into a model if they are that one's."""
        if model is self._model:
            model.loras.update(self._on_device)

    def leave(self) -> None:
        """Have the model keep those in host memory only. Never raises."""
        self._model.loras.update(self._on_host)
        self._on_device = {}


class DeviceCopy:
    """A region's bytes on the device. Until `wait` has returned, the region must stay.

    bytes: the tensor of them, uint8.
    """

    def __init__(self, region: Any, device: Any) -> None:
        """region: a tensor of its bytes, uint8. Raises torch.OutOfMemoryError."""
        import torch

        self._region = region
        self.bytes = torch.empty_like(region, device=device)
        self._copied = 0
        self._stream: Any = None
        if self.bytes.is_cuda:
            # The memory is this thread's current stream's, which may still use it for what it held.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once no copy is in flight."""
        if self._stream is not None:
            self._stream.synchronize()

    def copy_up_to(self, end: int) -> None:
        """Begin to copy what is in the region before byte `end`, and was not copied yet."""
        begin, self._copied = self._copied, max(end, self._copied)
        if begin >= end:  # after most reads
            return
        import torch

        with torch.cuda.stream(self._stream):  # nothing, for None
            for first in range(begin, end, PIECE_BYTES):
                piece = slice(first, min(first + PIECE_BYTES, end))
                self.bytes[piece].copy_(self._region[piece], non_blocking=True)


def begin_copy(region: Any, device: Any) -> DeviceCopy | None:
    """A copy of a region, or None where that would leave too little for the engine's steps."""
    import torch

    if device.type != "cuda" or not has_room(len(region), device):
        return None
    try:
        return DeviceCopy(region, device)
    except torch.OutOfMemoryError:  # somebody was faster
        return None


def has_room(size: int, device: Any) -> bool:
    """Whether a copy of `size` bytes is a small part of what is free on the device."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= (free + unused) // _SHARE
