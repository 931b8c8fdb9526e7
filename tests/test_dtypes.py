"""The table of dtypes, against torch and the reference writer of safetensors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from lorashard.dtypes import (
    CAST_DTYPES,
    ELEMENT_BITS,
    ELEMENT_SIZE,
    EXPONENT_BITS,
    FILE_ORDER,
    FLOAT_DTYPES,
    TORCH_DTYPES,
)
from lorashard.header import header_length, parse_header

# What safetensors.torch calls what, for all that torch has.
IN_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
# Floats in which no LoRA factor is taken: infinity and NaN are not marked as in the others.
OTHER_FLOATS = {"F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
PARTS_OF_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")  # in the order of safetensors 0.8
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def test_every_dtype_has_the_size_that_torch_gives_it() -> None:
    assert {name: dtype.itemsize for name, dtype in IN_TORCH.items()} == ELEMENT_SIZE
    assert {name: 8 * size for name, size in ELEMENT_SIZE.items()} == {
        name: bits for name, bits in ELEMENT_BITS.items() if name not in PARTS_OF_A_BYTE
    }


def test_the_floats_are_those_of_torch_under_its_names() -> None:
    floats = {
        name: dtype
        for name, dtype in IN_TORCH.items()
        if dtype.is_floating_point and name not in OTHER_FLOATS
    }
    assert {name: getattr(torch, in_torch) for name, in_torch in TORCH_DTYPES.items()} == floats
    assert set(floats) == FLOAT_DTYPES == set(EXPONENT_BITS)


def test_files_are_ordered_as_the_reference_writer_orders_them() -> None:
    raw = save(
        {
            name: torch.zeros(8 * dtype.itemsize, dtype=torch.uint8).view(dtype)
            for name, dtype in (IN_TORCH | {"F4": torch.float4_e2m1fn_x2}).items()
        }
    )
    length = header_length(raw[:8], len(raw), "written")
    written = parse_header(raw[8 : 8 + length], len(raw), "written").tensors
    ordered = sorted(FILE_ORDER, key=FILE_ORDER.__getitem__)
    assert [entry.name for entry in written] == [name for name in ordered if "F6_" not in name]
    assert ordered[-5:] == ["U8", *reversed(PARTS_OF_A_BYTE), "BOOL"]


@pytest.mark.parametrize("name", ["F8_E5M2", "F8_E4M3", "F16", "BF16"])
def test_exactly_the_values_that_are_not_finite_have_every_exponent_bit_set(name: str) -> None:
    size, mask = ELEMENT_SIZE[name], EXPONENT_BITS[name]
    patterns = torch.arange(256**size)
    values = patterns.to(torch.uint8) if size == 1 else patterns.to(torch.int16)
    floats = values.view(IN_TORCH[name]).to(torch.float64)
    assert torch.equal((patterns & mask) == mask, ~torch.isfinite(floats))


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_wide_floats_have_every_exponent_bit_set_only_if_not_finite(name: str) -> None:
    dtype, mask = IN_TORCH[name], EXPONENT_BITS[name]
    limits = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny], dtype=dtype)
    other = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")], dtype=dtype)
    bits = BITS[ELEMENT_SIZE[name]]
    assert not ((finite.view(bits) & mask) == mask).any()
    assert ((other.view(bits) & mask) == mask).all()


def test_a_cast_goes_to_what_vllm_serves() -> None:
    assert CAST_DTYPES == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
