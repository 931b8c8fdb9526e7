"""One block of a Rearrange -> the bytes of each expert's slot. torch is imported only where it
is needed: to transpose or to cast; padding a smaller r is done on memoryviews.

Legend: e expert, r row, c column of a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Literal

from lorashard.blocks import RearrangeBlock, axis_sizes
from lorashard.header import ELEMENT_SIZE
from lorashard.plan import Rearrange, Target

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_UNSIGNED: Mapping[int, Literal["B", "H", "I", "Q"]] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # memoryview formats that move any dtype's bits
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # likewise for torch

# Where some bytes of every copy of one expert go, and the bytes.
SlotView = tuple[tuple[Target, ...], memoryview]


def rearrange_block(
    block: RearrangeBlock, source: memoryview, scratch: memoryview
) -> Iterator[SlotView]:
    """Yield (places, bytes) for every slot that the block touches.

    source: the block's bytes. scratch: scratch_bytes(block) long; the yielded views point into
    it and are valid until the next call.
    """
    if block.op.axes == "rec" and len(block.op.targets) == 1 and not _casts(block.op):
        _pad_rows(block.op, source, scratch)
    else:
        _permute(block, source, scratch)
    yield from slot_views(block, scratch)


def restore_block(block: RearrangeBlock, scratch: memoryview, source: memoryview) -> None:
    """The inverse: fill `source` with the block's bytes from slots read into `scratch`."""
    if block.op.axes == "rec" and len(block.op.targets) == 1:
        _unpad_rows(block.op, scratch, source)
    else:
        _permute(block, source, scratch, inverse=True)


def slot_views(block: RearrangeBlock, scratch: memoryview) -> Iterator[SlotView]:
    """Where each stretch of `scratch` stands in the output files."""
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
    """How much scratch a block needs: its factors in the target dtype, rows padded."""
    return prod(_scratch_shape(block)) * ELEMENT_SIZE[block.op.dtype]


def _block_sizes(block: RearrangeBlock) -> dict[str, int]:
    return axis_sizes(block.op) | {block.op.axes[0]: block.last - block.first}


def _scratch_shape(block: RearrangeBlock) -> tuple[int, int, int]:
    """[expert, row, col]: whole slots, cut only along the axis that the block is cut along."""
    op, sizes = block.op, _block_sizes(block)
    rows = sizes["r"] if op.axes[0] == "r" else op.slot_rows
    cols = sizes["c"] if op.axes[0] == "c" else op.slot_cols
    return sizes["e"], rows, cols


def _shifted(targets: tuple[Target, ...], shift: int) -> tuple[Target, ...]:
    return tuple(Target(target.file, target.offset + shift) for target in targets)


def _casts(op: Rearrange) -> bool:
    return op.dtype != op.source_dtype


def _pad_rows(op: Rearrange, source: memoryview, out: memoryview) -> None:
    kind = _UNSIGNED[ELEMENT_SIZE[op.dtype]]
    if op.cols == op.slot_cols:
        out[:] = source
        return
    out[:] = bytes(len(out))
    wide, narrow = out.cast(kind), source.cast(kind)
    for col in range(op.cols):
        wide[col :: op.slot_cols] = narrow[col :: op.cols]


def _unpad_rows(op: Rearrange, padded: memoryview, out: memoryview) -> None:
    kind = _UNSIGNED[ELEMENT_SIZE[op.dtype]]
    wide, narrow = padded.cast(kind), out.cast(kind)
    for col in range(op.cols):
        narrow[col :: op.cols] = wide[col :: op.slot_cols]


def _permute(
    block: RearrangeBlock, source: memoryview, scratch: memoryview, *, inverse: bool = False
) -> None:
    import torch

    torch.set_num_threads(1)  # blocks run side by side already
    op, sizes = block.op, _block_sizes(block)
    in_source = _tensor(source, op, op.source_dtype).view([sizes[axis] for axis in op.axes])
    in_slots = _tensor(scratch, op, op.dtype).view(_scratch_shape(block))
    filled = in_slots[:, : sizes["r"], : sizes["c"]]
    as_slots = in_source.permute([op.axes.index(axis) for axis in "erc"])
    if inverse:
        as_slots.copy_(filled)
        return
    if filled.shape != in_slots.shape:
        in_slots.zero_()
    filled.copy_(as_slots)


def _tensor(data: memoryview, op: Rearrange, dtype: str) -> torch.Tensor:
    import torch

    # Without a cast the bits are moved as integers, so that no NaN payload can change.
    name = TORCH_DTYPES[dtype] if _casts(op) else _INTEGERS[ELEMENT_SIZE[dtype]]
    return torch.frombuffer(data, dtype=getattr(torch, name))
