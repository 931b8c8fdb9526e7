"""Blocks of a fused factor turned to slots and back, and cast on the way."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.errors import LayoutError
from lorashard.shards.plan import Rearrange, Target
from lorashard.writing.blocks import split_into_blocks
from lorashard.writing.rearrange import (
    copy_in_tiles,
    rearrange_block,
    restore_block,
    scratch_bytes,
    slot_views,
)

E, R, C = 3, 2, 5
ORDERS = ["".join(order) for order in permutations("erc")]
CASTS = [(source, dtype) for source in TORCH_DTYPES for dtype in ("F32", "F16", "BF16")]


def rearrangement(
    axes: str, slot: tuple[int, int] = (R, C), dtypes: tuple[str, str] = ("F16", "F16")
) -> Rearrange:
    source_dtype, dtype = dtypes
    slot_bytes = slot[0] * slot[1] * ELEMENT_SIZE[dtype]
    slots = tuple((Target(0, e * slot_bytes),) for e in range(E))
    size = E * R * C * ELEMENT_SIZE[source_dtype]
    return Rearrange(0, size, axes, R, C, *slot, source_dtype, dtype, slots)


def slots_of(op: Rearrange, source: bytes, limit: int = 2**20) -> bytes:
    """The bytes of all slots, put together from blocks of at most `limit` bytes."""
    image = bytearray(E * op.slot_bytes)
    for block in split_into_blocks((op,), limit, limit):
        data = memoryview(bytearray(source[block.begin : block.end]))
        scratch = memoryview(bytearray(b"\xff" * scratch_bytes(block)))
        for targets, view in rearrange_block(block, data, scratch):
            for target in targets:
                image[target.offset : target.offset + len(view)] = view
    return bytes(image)


def numbers() -> np.ndarray:
    """[E, R, C]; each element is another one."""
    return np.arange(1, 1 + E * R * C, dtype=np.uint16).reshape(E, R, C)


def in_order(axes: str) -> bytes:
    return np.ascontiguousarray(numbers().transpose(["erc".index(a) for a in axes])).tobytes()


@pytest.mark.parametrize("limit", [1, 40, 2**20])
@pytest.mark.parametrize("axes", ORDERS)
def test_every_order_of_axes_and_size_of_blocks_gives_the_same_slots(axes: str, limit: int) -> None:
    assert slots_of(rearrangement(axes), in_order(axes), limit) == numbers().tobytes()


@pytest.mark.parametrize("limit", [1, 40, 2**20])
@pytest.mark.parametrize("wanted", [(), (0,), (1, 2), (0, 2), (2,)])
@pytest.mark.parametrize("axes", ORDERS)
def test_slots_without_targets_are_passed_over(
    axes: str, wanted: tuple[int, ...], limit: int
) -> None:
    op = rearrangement(axes)
    targets = tuple(places if e in wanted else () for e, places in enumerate(op.targets))
    expected = np.zeros_like(numbers())
    expected[list(wanted)] = numbers()[list(wanted)]
    assert slots_of(replace(op, targets=targets), in_order(axes), limit) == expected.tobytes()


@pytest.mark.parametrize("axes", ORDERS)
def test_what_the_factor_does_not_fill_is_zero(axes: str) -> None:
    op = rearrangement(axes, slot=(R + 1, C) if axes[0] != "c" else (R, C))
    expected = np.zeros((E, op.slot_rows, op.slot_cols), np.uint16)
    expected[:, :R, :C] = numbers()
    assert slots_of(op, in_order(axes)) == expected.tobytes()


@pytest.mark.parametrize("limit", [1, 40, 2**20])
@pytest.mark.parametrize("axes", ORDERS)
def test_slots_are_turned_back_into_the_source(axes: str, limit: int) -> None:
    op, slots = rearrangement(axes), numbers().tobytes()
    source = bytearray(op.end)
    for block in split_into_blocks((op,), limit, limit):
        scratch = memoryview(bytearray(scratch_bytes(block)))
        for targets, view in slot_views(block, scratch):
            view[:] = slots[targets[0].offset : targets[0].offset + len(view)]
        restore_block(block, scratch, memoryview(source)[block.begin : block.end])
    assert bytes(source) == in_order(axes)


@pytest.mark.parametrize("shape", [(3, 2, 5), (131, 2, 300), (1, 257, 129), (2, 300, 1), (0, 3, 4)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint64])
@pytest.mark.parametrize("order", list(permutations((0, 1, 2))))
def test_a_copy_in_tiles_is_a_copy(
    order: tuple[int, int, int], kind: type[np.unsignedinteger], shape: tuple[int, int, int]
) -> None:
    size = int(np.prod(shape))
    in_memory = (np.arange(size) % 251).astype(kind).reshape([shape[axis] for axis in order])
    source = in_memory.transpose(np.argsort(order))
    wider = np.full((shape[0], shape[1] + 1, shape[2] + 2), 255, kind)
    copy_in_tiles(source, wider[:, :-1, :-2])
    assert np.array_equal(wider[:, :-1, :-2], source)
    assert (wider[:, -1:] == 255).all()
    assert (wider[:, :, -2:] == 255).all()
    back = np.zeros_like(in_memory)
    copy_in_tiles(wider[:, :-1, :-2], back.transpose(np.argsort(order)))
    assert np.array_equal(back, in_memory)


def bits(values: Tensor) -> bytes:
    return bytes(values.contiguous().view(torch.uint8).numpy().tobytes())


def cast(values: Tensor, source: str, dtype: str) -> Tensor:
    """Values of [E, R, C] through the slots of another dtype."""
    raw = slots_of(rearrangement("erc", dtypes=(source, dtype)), bits(values))
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, TORCH_DTYPES[dtype]))


def filled(value: float, source: str) -> Tensor:
    """[E, R, C] of ones, and in one place `value`."""
    values = torch.ones(E * R * C, dtype=torch.float64)
    values[17] = value
    return values.to(getattr(torch, TORCH_DTYPES[source]))


@pytest.mark.parametrize(("source", "dtype"), CASTS)
def test_a_cast_is_that_of_torch(source: str, dtype: str) -> None:
    values = torch.linspace(-400, 400, E * R * C).to(getattr(torch, TORCH_DTYPES[source]))
    expected = values.to(getattr(torch, TORCH_DTYPES[dtype]))
    assert bits(cast(values, source, dtype)) == bits(expected)


@pytest.mark.parametrize("source", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_cast_from_8_bits_changes_no_value(source: str, dtype: str) -> None:
    in_torch = getattr(torch, TORCH_DTYPES[source])
    values = torch.arange(256, dtype=torch.uint8).view(in_torch).to(torch.float64)
    finite = values[torch.isfinite(values)]
    for chunk in finite.split(E * R * C)[:-1]:
        assert torch.equal(cast(chunk.to(in_torch), source, dtype).to(torch.float64), chunk)


@pytest.mark.parametrize(
    ("source", "dtype", "value"),
    [
        ("F32", "F16", 65_520.0),
        ("F32", "F16", -1e30),
        ("BF16", "F16", 65_536.0),
        ("F64", "F16", 65_520.0),
        ("F64", "F32", 1e39),
        ("F64", "BF16", -1e39),
        ("F32", "BF16", 3.4e38),
    ],
)
def test_a_value_that_a_cast_would_make_infinite_is_refused(
    source: str, dtype: str, value: float
) -> None:
    values = filled(value, source)
    shown = re.escape(f"{float(values[17]):g}")
    with pytest.raises(LayoutError, match=f"too large for {dtype}: {shown}") as raised:
        cast(values, source, dtype)
    assert "`dtype`" in str(raised.value)


@pytest.mark.parametrize(("source", "value"), [("F32", 65_519.0), ("F64", -65_504.0)])
def test_the_largest_value_that_fits_is_not_refused(source: str, value: float) -> None:
    assert abs(float(cast(filled(value, source), source, "F16")[17])) == 65_504.0


@pytest.mark.parametrize(("source", "dtype"), [c for c in CASTS if c[0] != "F8_E4M3"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinity_of_the_source_stays_one(source: str, dtype: str, value: float) -> None:
    assert float(cast(filled(value, source), source, dtype)[17]) == value


@pytest.mark.parametrize(("source", "dtype"), CASTS)
def test_nan_stays_nan(source: str, dtype: str) -> None:
    result = cast(filled(float("nan"), source), source, dtype)
    assert torch.isnan(result).nonzero().tolist() == [[17]]


def test_a_factor_that_a_cast_would_make_zero_is_refused() -> None:
    small = torch.zeros(E * R * C)
    small[:3] = torch.tensor([1e-10, -3e-10, 2e-11])
    with pytest.raises(LayoutError, match="become 0 in F16; the largest of them is 3e-10"):
        cast(small, "F32", "F16")
    assert cast(small, "F32", "BF16")[1] != 0
    assert not cast(torch.zeros(E * R * C), "F32", "F16").any()
    small[4] = 1.0
    assert cast(small, "F32", "F16")[:5].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
