"""The tensors that this rank has, and their bytes on the way to the shard files.

In: torch tensors, on the CPU or a GPU, and their parts. Out: writes to open files. The tensors are
referred to, not copied; what passes through host memory at a time is bounded.
"""

from __future__ import annotations

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
from lorashard.storage.local import SharedWriter
from lorashard.writing.blocks import find_runs
from lorashard.writing.rearrange import rearrange_block, scratch_bytes

_HOST_BYTES = 64 * 2**20  # of a tensor, at a time
_WRITERS = 2


@dataclass(frozen=True, slots=True)
class OwnTensor:
    """A tensor [len(parts), ...] of parts of one size, in this order."""

    parts: tuple[Part, ...]
    values: Any


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
    files: Sequence[SharedWriter],
) -> None:
    """Write this rank's bytes to where they belong.

    is_mine: whether this rank writes a part of which others have copies. files: in plan order.
    """
    scratch = ThreadBuffer()
    wait_for({tensor.values.device for tensor in tensors})  # the threads have streams of their own

    def write(chunk: OwnTensor) -> None:
        data = _bytes_of(chunk.values)
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

    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(write, [chunk for tensor in tensors for chunk in _chunks(tensor)]):
            pass


def _write_rearranged(
    each: PartBlock, data: memoryview, files: Sequence[SharedWriter], scratch: ThreadBuffer
) -> None:
    block = each.block
    source = data[each.begin : each.begin + block.end - block.begin]
    for targets, view in rearrange_block(block, source, scratch.get(scratch_bytes(block))):
        for target in targets:
            files[target.file].write([view], target.offset)


def _chunks(tensor: OwnTensor) -> Iterator[OwnTensor]:
    """The tensor in pieces of at most `_HOST_BYTES`, but at least one part each."""
    size = tensor.values.numel() * tensor.values.element_size() // max(1, len(tensor.parts))
    step = max(1, _HOST_BYTES // max(1, size))
    for first in range(0, len(tensor.parts), step):
        yield OwnTensor(tensor.parts[first : first + step], tensor.values[first : first + step])


def _bytes_of(values: Any) -> memoryview:
    import torch

    host = values.detach().contiguous().cpu()
    return memoryview(host.view(-1).view(torch.uint8).numpy())
