"""Named tensors in memory -> the bytes of the safetensors file that they would make.

The tensors may be on any device, and are never changed. What is contiguous is copied only as it is
read, in whatever thread. The CUDA stream of another thread does not wait for the one on which the
caller's tensors are being made, so this is waited for first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lorashard.dtypes import name_of_torch
from lorashard.errors import AdapterError, HeaderError
from lorashard.header import build_header

if TYPE_CHECKING:
    import torch


class TensorFile:
    """A ByteSource over tensors.

    name: where they come from, for messages. header: the file's bytes up to the data.
    """

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Waits for what this thread has queued on the tensors' devices.

        Raises AdapterError for a dtype that no adapter has.
        """
        self.name = name
        self.header, entries = build_header(
            [(key, _dtype_name(key, t, name), tuple(t.shape)) for key, t in tensors.items()],
            {"format": "pt"},
        )
        self._begins = [entry.begin for entry in entries]
        self._tensors = [tensors[entry.name].detach() for entry in entries]
        self.size_bytes = entries[-1].end if entries else len(self.header)
        wait_for({tensor.device for tensor in self._tensors})

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the safetensors file."""
        buffer = bytearray(end - begin)
        self.read_into(memoryview(buffer), begin)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; raise HeaderError if the file ends before."""
        if offset + len(buffer) > self.size_bytes:
            raise HeaderError(self.name, f"its tensors end at byte {self.size_bytes}")
        head = self.header[offset : offset + len(buffer)]
        buffer[: len(head)] = head
        buffer, offset = buffer[len(head) :], offset + len(head)
        index = bisect_right(self._begins, offset) - 1
        while buffer:
            begin = offset - self._begins[index]
            if not self._tensors[index].is_contiguous():
                self._tensors[index] = self._tensors[index].contiguous()  # once, not for each read
            size = _copy_bytes(self._tensors[index], begin, buffer)
            buffer, offset, index = buffer[size:], offset + size, index + 1


def wait_for(devices: Collection[torch.device]) -> None:
    """Return once this thread's current stream on each device is done with what is queued now."""
    import torch

    for device in devices:
        if device.type in ("cuda", "xpu"):
            torch.get_device_module(device).current_stream(device).synchronize()


def _copy_bytes(tensor: torch.Tensor, begin: int, buffer: memoryview) -> int:
    """Copy the tensor's bytes from `begin` on, as many as the buffer takes; returns the number."""
    import torch

    data = tensor.view(-1).view(torch.uint8)[begin : begin + len(buffer)]
    if len(data):
        torch.frombuffer(buffer, dtype=torch.uint8, count=len(data)).copy_(data)
    return len(data)


def _dtype_name(name: str, tensor: torch.Tensor, where: str) -> str:
    known = name_of_torch(tensor.dtype)
    if known is None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{where}: tensor {name!a} has dtype {dtype}, which is no adapter's.",
            hint="Save the adapter again with safe_serialization=True.",
        )
    return known
