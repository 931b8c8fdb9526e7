"""The tensors that this rank has, and their bytes on the way to the shard files.

In: torch tensors, on the CPU or a GPU, and their parts. Out: writes to open files. The tensors are
referred to, not copied; what passes through host memory at a time is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.tensor_file import wait_for
from lorashard.dtypes import name_of_torch
from lorashard.errors import LayoutError
from lorashard.publish.parts import Part
from lorashard.publish.places import PartBlock, PartPlaces
from lorashard.storage.buffers import ThreadBuffer
from lorashard.storage.local import Writer
from lorashard.writing.blocks import find_runs
from lorashard.writing.rearrange import rearrange_block, scratch_bytes

_HOST_BYTES = 64 * 2**20  # of a tensor, at a time
_PINNED_BYTES = 8 * 2**20  # the same, of one on a GPU with smaller parts
_ALL_HOST_BYTES = 256 * 2**20
_LEAST_WRITERS, _MOST_WRITERS = 2, 8


@dataclass(frozen=True, slots=True)
class OwnTensor:
    """A tensor [len(parts), ...] of parts of one size, in this order."""

    parts: tuple[Part, ...]
    values: Any


class HostCopy(threading.local):
    """The bytes of a tensor in this machine's memory; of one on a GPU, in a buffer for each thread.

    The buffer is pinned: a GPU copies into other memory at a fraction of the speed. torch keeps it for
    the next commit.
    """

    def __init__(self) -> None:
        self._pinned: Any = None

    def bytes_of(self, values: Any) -> memoryview:
        """They are valid until the next call from this thread."""
        import torch

        data = values.detach().contiguous().view(-1).view(torch.uint8)
        if data.device.type == "cuda" and 0 < len(data) <= _HOST_BYTES:
            if self._pinned is None or len(self._pinned) < len(data):
                size = max(_PINNED_BYTES, len(data))
                self._pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            return memoryview(self._pinned[: len(data)].copy_(data).numpy())
        return memoryview(data.cpu().numpy())


def dtype_of(tensor: Any, name: str) -> str:
    """The dtype as safetensors names it. Raises LayoutError for one that it cannot store."""
    found = name_of_torch(tensor.dtype)
    if found is None:
        raise LayoutError(
            f"{name} has dtype {tensor.dtype}.", hint="Cast it to a float type first."
        )
    return found


def write_own(
    tensors: Sequence[OwnTensor],
    places: PartPlaces,
    is_mine: Callable[[Part], bool],
    files: Sequence[Writer],
    num_cpus: int,
) -> None:
    """Write this rank's bytes to where they belong.

    is_mine: whether this rank writes a part of which others have copies. files: in plan order.
    num_cpus: of the machine's, this rank's share.
    """
    scratch, host = ThreadBuffer(), HostCopy()
    wait_for({tensor.values.device for tensor in tensors})  # the threads have streams of their own

    def write(chunk: OwnTensor) -> None:
        data = host.bytes_of(chunk.values)
        size = len(data) // len(chunk.parts)
        mine = [(i * size, part) for i, part in enumerate(chunk.parts) if is_mine(part)]
        found = (
            (place.target, first + place.begin, first + place.end)
            for first, part in mine
            for place in places.copies(part)
        )
        for run in find_runs(found):
            pieces = [data[begin:end] for begin, end in run.pieces]
            files[run.target.file].write(pieces, run.target.offset)
        for first, part in mine:
            for each in places.rearrangements(part):
                _write_rearranged(each, data[first : first + size], files, scratch)

    chunks = [chunk for tensor in tensors for chunk in _chunks(tensor)]
    with ThreadPoolExecutor(_num_writers(chunks, num_cpus)) as pool:
        for _ in pool.map(write, chunks):
            pass


def _write_rearranged(
    each: PartBlock, data: memoryview, files: Sequence[Writer], scratch: ThreadBuffer
) -> None:
    block = each.block
    source = data[each.begin : each.begin + block.end - block.begin]
    for targets, view in rearrange_block(block, source, scratch.get(scratch_bytes(block))):
        for target in targets:
            files[target.file].write([view], target.offset)


def _num_writers(chunks: Sequence[OwnTensor], num_cpus: int) -> int:
    """As many as there are processors for, and memory for a chunk of each."""
    largest = max((chunk.values.nbytes for chunk in chunks), default=1)
    return max(_LEAST_WRITERS, min(_MOST_WRITERS, num_cpus, _ALL_HOST_BYTES // max(1, largest)))


def _chunks(tensor: OwnTensor) -> Iterator[OwnTensor]:
    """The tensor in pieces that fit a buffer, but at least one part each."""
    size = tensor.values.numel() * tensor.values.element_size() // max(1, len(tensor.parts))
    limit = _PINNED_BYTES if tensor.values.device.type == "cuda" else _HOST_BYTES
    step = max(1, limit // max(1, size))
    for first in range(0, len(tensor.parts), step):
        yield OwnTensor(tensor.parts[first : first + step], tensor.values[first : first + step])
