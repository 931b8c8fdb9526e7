"""One block of a Rearrange -> the bytes of each expert's slot, and back.

numpy moves bits as integers, so that nothing can change on the way. torch is imported only to cast
to another dtype, because numpy has no bfloat16. Plain copies need neither.

Legend: e expert, r row, c column of a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.errors import LayoutError
from lorashard.rules import LOST_IN_A_CAST
from lorashard.shards.plan import Rearrange, Target
from lorashard.storage.packages import import_package
from lorashard.writing.blocks import RearrangeBlock, axis_sizes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.unsignedinteger[Any]]

# Half of the first cache: lines that are loaded once, while elements of each are moved one by one.
_TILE_BYTES = 32 * 2**10
_NEAR_BYTES = 512  # lines further apart than this would take each other's places there
_LONGEST_RUN = 256  # elements
# Gathered first, into the second cache, if neither side has its lines near each other.
_GATHERED_BYTES = 256 * 2**10
_GATHERED_ELEMENTS = 128  # along the fastest axis of either side

# Bytes of one expert's slot, and where they go: one target for each copy of the expert.
SlotView = tuple[tuple[Target, ...], memoryview]


@dataclass(frozen=True, slots=True)
class CastLoss:
    """How many values of a block became 0 in a cast, and how many are infinite or NaN.

    begin: of its Rearrange, in bytes from the start of the source.
    """

    begin: int
    num_zeroed: int
    num_not_finite: int


def rearrange_block(
    block: RearrangeBlock,
    source: memoryview,
    scratch: memoryview,
    on_loss: Callable[[CastLoss], object] = lambda _: None,
) -> Iterator[SlotView]:
    """Yield (targets, bytes) for every slot that the block touches.

    The bytes of a slot without targets mean nothing.
    source: the block's bytes. scratch: scratch_bytes(block) long; the yielded views point into it.
    on_loss: called if a cast has lost values.
    Raises LayoutError if a cast would make a finite value infinite, or all values 0.
    """
    source = _cast(source, block.op, on_loss)
    in_source, in_slots = _views(block, source, scratch)
    filled = in_slots[:, : in_source.shape[1], : in_source.shape[2]]
    if filled.shape != in_slots.shape:
        in_slots[:] = 0
    wanted = _wanted_slots(block)
    copy_in_tiles(in_source[wanted], filled[wanted])
    yield from slot_views(block, scratch)


def _wanted_slots(block: RearrangeBlock) -> slice:
    """The block's slots that have targets, and as few others as a slice allows."""
    op = block.op
    targets = op.targets[block.first : block.last] if op.axes[0] == "e" else op.targets
    wanted = [slot for slot, places in enumerate(targets) if places]
    if not wanted:
        return slice(0, 0)
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    is_regular = wanted == list(range(wanted[0], wanted[-1] + 1, step))
    return slice(wanted[0], wanted[-1] + 1, step if is_regular else 1)


def restore_block(block: RearrangeBlock, scratch: memoryview, source: memoryview) -> None:
    """The inverse: fill `source` with the block's bytes, given its slots in `scratch`."""
    in_source, in_slots = _views(block, source, scratch)
    copy_in_tiles(in_slots[:, : in_source.shape[1], : in_source.shape[2]], in_source)


def copy_in_tiles(source: Bits, into: Bits) -> None:
    """`into[:] = source` for two views whose axes are in memory in different orders.

    numpy's own loop goes through one side in order, and on the other uses one element of each cache
    line that it loads: 0.4 to 2 GB/s. Here it goes through tiles of the cache's size: 4 GB/s.
    """
    if not source.size:
        return
    along, across = _fastest_axis(into), _fastest_axis(source)
    if along == across:
        into[:] = source
    elif source.strides[along] <= _NEAR_BYTES:
        _copy_runs(source, into, along, across, near=source)
    elif into.strides[across] <= _NEAR_BYTES:
        _copy_runs(source, into, across, along, near=into)
    else:
        _gather_and_copy(source, into, along, across)


def _gather_and_copy(source: Bits, into: Bits, along: int, across: int) -> None:
    """The same if the lines of a tile are far apart on both sides."""
    (other,) = {0, 1, 2} - {along, across}
    order = other, along, across
    steps = [min(size, _GATHERED_ELEMENTS) for size in source.shape]
    steps[other] = 1
    steps[other] = max(1, _GATHERED_BYTES // (source.itemsize * prod(steps)))
    for begins in product(*map(range, (0, 0, 0), source.shape, steps)):
        part = tuple(slice(begin, begin + step) for begin, step in zip(begins, steps))
        gathered = source[part].transpose(order).copy(order="C")
        _copy_runs(gathered, into[part].transpose(order), along=1, across=2, near=gathered)


def _copy_runs(source: Bits, into: Bits, along: int, across: int, *, near: Bits) -> None:
    """Copy runs along one axis, in tiles that have those of all places on another.

    near: the side on which `across` is the fastest axis, and neighbours along the runs are near.
    """
    import numpy as np  # noqa: PLC0415 - plain copies do not need it

    (other,) = {0, 1, 2} - {along, across}
    longest = min(_LONGEST_RUN, max(1, _TILE_BYTES // near.strides[along]))
    length = min(longest, near.shape[along])
    for begin, end, count in _even_parts(near.shape[other], longest // length):
        for first, last, run in _even_parts(near.shape[along], length):
            part = [slice(None)] * 3
            part[other], part[along] = slice(begin, end), slice(first, last)
            shape = (end - begin) // count, count, near.shape[across], (last - first) // run, run
            views = (
                side[tuple(part)].transpose(other, across, along).reshape(shape)
                for side in (source, into)
            )
            tiles, into_tiles = (view.transpose(0, 3, 2, 1, 4) for view in views)
            # Only a ufunc takes the order of its loops; this one copies, and needs no interpreter.
            np.positive(tiles, out=into_tiles, order="C")


def _even_parts(size: int, step: int) -> Iterator[tuple[int, int, int]]:
    """[0, size) as (begin, end, step): what is a multiple of the step, and the rest in one."""
    rest = size % step
    if size > rest:
        yield 0, size - rest, step
    if rest:
        yield size - rest, size, rest


def _fastest_axis(view: Bits) -> int:
    """The axis along which neighbours are nearest in memory."""
    return min(range(view.ndim), key=lambda axis: (view.shape[axis] == 1, view.strides[axis]))


def slot_views(block: RearrangeBlock, scratch: memoryview) -> Iterator[SlotView]:
    """Yield each stretch of `scratch` with its targets in the output files."""
    op, element_size = block.op, ELEMENT_SIZE[block.op.dtype]
    sizes = _block_sizes(block)
    per_expert = len(scratch) // sizes["e"]
    first_expert = block.first if op.axes[0] == "e" else 0
    for position in range(sizes["e"]):
        view = scratch[position * per_expert : (position + 1) * per_expert]
        targets = op.targets[first_expert + position]
        if op.axes[0] == "e" or sizes[op.axes[0]] == axis_sizes(op)[op.axes[0]]:
            yield targets, view
        elif op.axes[0] == "r":
            yield _shifted(targets, block.first * op.slot_cols * element_size), view
        else:  # columns [first, last) of every row
            width = sizes["c"] * element_size
            for row in range(sizes["r"]):
                shift = (row * op.slot_cols + block.first) * element_size
                yield _shifted(targets, shift), view[row * width : (row + 1) * width]


def scratch_bytes(block: RearrangeBlock) -> int:
    """How much scratch a block needs: its factors in the slots' dtype, padded to whole slots."""
    return prod(_scratch_shape(block)) * ELEMENT_SIZE[block.op.dtype]


def _block_sizes(block: RearrangeBlock) -> dict[str, int]:
    return axis_sizes(block.op) | {block.op.axes[0]: block.last - block.first}


def _scratch_shape(block: RearrangeBlock) -> tuple[int, int, int]:
    """[expert, row, col]: whole slots, except along the axis that the block is cut along."""
    op, sizes = block.op, _block_sizes(block)
    rows = sizes["r"] if op.axes[0] == "r" else op.slot_rows
    cols = sizes["c"] if op.axes[0] == "c" else op.slot_cols
    return sizes["e"], rows, cols


def _shifted(targets: tuple[Target, ...], shift: int) -> tuple[Target, ...]:
    return tuple(Target(target.file, target.offset + shift) for target in targets)


def _views(block: RearrangeBlock, source: memoryview, scratch: memoryview) -> tuple[Bits, Bits]:
    """The block's source and slots, both as [expert, row, col] of bits."""
    import numpy as np  # noqa: PLC0415 - plain copies do not need it

    axes, sizes = block.op.axes, _block_sizes(block)
    kind = np.dtype(f"u{ELEMENT_SIZE[block.op.dtype]}")
    in_source = np.frombuffer(source, kind).reshape([sizes[axis] for axis in axes])
    in_slots = np.frombuffer(scratch, kind).reshape(_scratch_shape(block))
    return in_source.transpose([axes.index(axis) for axis in "erc"]), in_slots


def _cast(data: memoryview, op: Rearrange, on_loss: Callable[[CastLoss], object]) -> memoryview:
    """The block in the dtype of the slots.

    Raises LayoutError if a value is too large for that, or all of them are too small.
    """
    if op.dtype == op.source_dtype:
        return data
    torch = import_package("torch", "a cast")
    source_dtype = getattr(torch, TORCH_DTYPES[op.source_dtype])
    dtype = getattr(torch, TORCH_DTYPES[op.dtype])
    count = len(data) // ELEMENT_SIZE[op.source_dtype]
    cast = bytearray(count * ELEMENT_SIZE[op.dtype])
    before, after = torch.frombuffer(data, dtype=source_dtype), torch.frombuffer(cast, dtype=dtype)
    after.copy_(before)
    num_not_finite = count - int(torch.isfinite(after).count_nonzero())
    if num_not_finite:
        # float64 holds every value, and torch lacks isfinite for F8_E4M3.
        values = before.to(torch.float64)[torch.isinf(after)]
        too_large = values[torch.isfinite(values)]
        if len(too_large):
            raise LayoutError(
                f"A value is too large for {op.dtype}: {float(too_large[0]):g}.",
                hint="Use bfloat16 or float32 as `dtype`, or leave it out.",
                rule=LOST_IN_A_CAST,
            )
    num_kept = int(after.count_nonzero())
    if not num_kept:
        largest = float(before.to(torch.float64).abs().max()) if count else 0.0
        if largest:
            raise LayoutError(
                f"All values of a factor become 0 in {op.dtype}; the largest of them is {largest:g}.",
                hint="Use bfloat16 or float32 as `dtype`, or leave it out.",
                rule=LOST_IN_A_CAST,
            )
    num_zeroed = 0
    if ELEMENT_SIZE[op.source_dtype] > 1:  # those of 8 bits fit into all others
        num_zeroed = int(before.count_nonzero()) - num_kept
    if num_zeroed or num_not_finite:
        on_loss(CastLoss(op.begin, num_zeroed, num_not_finite))
    return memoryview(cast)
