"""Output tensors <- the slots of shard files: a tensor's bytes in blocks that fit a buffer.

A block is a run of indices of the tensor's slowest axis. What its parts need is read slot by slot,
then put where it belongs in one step; bits are moved by numpy as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorashard.convert.peft_tensors import OutputTensor, Part, Span
from lorashard.convert.target import Places
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.shards.plan import Target
from lorashard.storage.local import ByteSource
from lorashard.writing.blocks import BLOCK_BYTES, COLUMN_BLOCK_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

    Bits = npt.NDArray[np.unsignedinteger[Any]]


def assemble(
    tensor: OutputTensor,
    places: Places,
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
            _fill(factors, part, experts, window["r"], window["c"], places, files)
        yield block.data.cast("B")


def _fill(
    factors: Bits,
    part: Part,
    experts: Sequence[int],
    rows: range,
    cols: range,
    places: Places,
    files: Sequence[ByteSource],
) -> None:
    """Put what `part` has of these rows and columns into `factors` [e, row, col]."""
    first, last = _inside(part.rows, rows)
    left = max(cols.start, part.first_col)
    right = min(cols.stop, part.first_col + part.num_cols)
    if first >= last or left >= right:
        return
    from_rows = range(
        part.from_rows.begin + first * part.from_rows.step,
        part.from_rows.begin + (last - 1) * part.from_rows.step + 1,
    )
    from_cols = range(left - part.first_col, right - part.first_col)
    read = np.empty((len(experts), len(from_rows), len(from_cols)), factors.dtype)
    for position, expert in enumerate(experts):
        _read(read[position], part, places[part.stack.name][expert], from_rows, from_cols, files)
    begin = part.rows.begin + first * part.rows.step - rows.start
    end = begin + (last - first - 1) * part.rows.step + 1
    factors[:, begin : end : part.rows.step, left - cols.start : right - cols.start] = read[
        :, :: part.from_rows.step
    ]


def _inside(span: Span, window: range) -> tuple[int, int]:
    """Which of a span's indices are in the window: the first, and the one after the last."""
    first = max(0, -((span.begin - window.start) // span.step))
    last = min(span.size, -((span.begin - window.stop) // span.step))
    return first, last


def _read(
    into: Bits,
    part: Part,
    slot: Target,
    rows: range,
    cols: range,
    files: Sequence[ByteSource],
) -> None:
    """Read rows and columns of one slot; row by row where a block is some columns of all rows."""
    width, size = part.stack.cols, into.dtype.itemsize
    file = files[slot.file]
    if len(cols) < part.num_cols:
        for number, row in enumerate(rows):
            begin = slot.offset + (row * width + cols.start) * size
            file.read_into(into[number].data.cast("B"), begin)
        return
    whole = into if len(cols) == width else np.empty((len(rows), width), into.dtype)
    file.read_into(whole.data.cast("B"), slot.offset + rows.start * width * size)
    if whole is not into:
        into[:] = whole[:, cols.start : cols.stop]
