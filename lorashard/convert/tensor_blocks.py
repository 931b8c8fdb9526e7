"""Output tensors <- the slots of shard files: a tensor's bytes in blocks that fit a buffer.

A block is a run of indices of the tensor's slowest axis. What its parts need is read slot by slot,
then put where it belongs in one step; numpy moves the bits as unsigned integers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorashard.convert.peft_tensors import OutputTensor, StackPart
from lorashard.convert.slots import SlotTable
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.shards.plan import Target
from lorashard.storage.local import ByteSource
from lorashard.writing.blocks import BLOCK_BYTES, COLUMN_BLOCK_BYTES
from lorashard.writing.rearrange import copy_in_tiles

if TYPE_CHECKING:
    import numpy.typing as npt

    Bits = npt.NDArray[np.unsignedinteger[Any]]


def read_tensor_blocks(
    tensor: OutputTensor,
    slots: SlotTable,
    files: Sequence[ByteSource],
    block_bytes: int = BLOCK_BYTES,
    column_block_bytes: int = COLUMN_BLOCK_BYTES,
) -> Iterator[memoryview]:
    """Yield the tensor's bytes, block after block.

    One index of the slowest axis is never cut: an expert's factor, or one row of all experts.
    """
    factor = tensor.factor
    sizes = {"e": len(tensor.experts), "r": factor.rows, "c": factor.cols}
    slowest = tensor.axes[0]
    kind = np.dtype(f"u{ELEMENT_SIZE[factor.dtype]}")
    unit = sizes["e"] * sizes["r"] * sizes["c"] // sizes[slowest] * kind.itemsize
    limit = column_block_bytes if slowest == "c" else block_bytes
    step = max(1, limit // unit)
    for first in range(0, sizes[slowest], step):
        window = {axis: range(size) for axis, size in sizes.items()}
        window[slowest] = range(first, min(first + step, sizes[slowest]))
        block = np.zeros([len(window[axis]) for axis in tensor.axes], kind)
        factors = block.transpose([tensor.axes.index(axis) for axis in "erc"])
        experts = [tensor.experts[position] for position in window["e"]]
        for part in factor.parts:
            _copy_part(factors, part, experts, window["r"], window["c"], slots, files)
        yield block.data.cast("B")


def _copy_part(
    factors: Bits,
    part: StackPart,
    experts: Sequence[int],
    rows: range,
    cols: range,
    slots: SlotTable,
    files: Sequence[ByteSource],
) -> None:
    """Copy what `part` has of these rows and columns into `factors` [e, row, col]."""
    in_rows, in_cols = _positions_in(part.rows, rows), _positions_in(part.cols, cols)
    to_rows, to_cols = part.rows[in_rows], part.cols[in_cols]
    if not to_rows or not to_cols:
        return
    stack_rows, stack_cols = part.stack_rows[in_rows], range(len(part.cols))[in_cols]
    run = range(stack_rows[0], stack_rows[-1] + 1)  # read whole, also where every other row is used
    read = np.empty((len(experts), len(run), len(stack_cols)), factors.dtype)
    for position, expert in enumerate(experts):
        _read_slot(read[position], part, slots[part.stack.name][expert], run, stack_cols, files)
    into = factors[:, _slice_from(to_rows, rows.start), _slice_from(to_cols, cols.start)]
    copy_in_tiles(read[:, :: stack_rows.step], into)


def _positions_in(indices: range, window: range) -> slice:
    """The positions in `indices`, which ascend, of those that lie in the window."""
    return slice(bisect_left(indices, window.start), bisect_left(indices, window.stop))


def _slice_from(indices: range, begin: int) -> slice:
    """The same indices, counted from `begin`."""
    return slice(indices.start - begin, indices.stop - begin, indices.step)


def _read_slot(
    into: Bits,
    part: StackPart,
    slot: Target,
    rows: range,
    cols: range,
    files: Sequence[ByteSource],
) -> None:
    """Read rows and columns of one slot; row by row where a block is some columns of all rows."""
    width, size = part.stack.cols, into.dtype.itemsize
    file = files[slot.file]
    if len(cols) < len(part.cols):
        for number, row in enumerate(rows):
            begin = slot.offset + (row * width + cols.start) * size
            file.read_into(into[number].data.cast("B"), begin)
        return
    whole = into if len(cols) == width else np.empty((len(rows), width), into.dtype)
    file.read_into(whole.data.cast("B"), slot.offset + rows.start * width * size)
    if whole is not into:
        into[:] = whole[:, cols.start : cols.stop]
