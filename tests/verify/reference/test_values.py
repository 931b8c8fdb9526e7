"""Values are compared as bits, and a difference is told with the numbers that torch would show."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorashard.errors import AdapterError
from lorashard.verify.reference import values
from lorashard.verify.reference.files import SafetensorsFile
from lorashard.verify.reference.values import (
    Bits,
    Difference,
    Fill,
    describe,
    differing_chunks,
    first_of,
)
from tests.imports import imported_by

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip
OTHERS = (
    torch.bool, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_numbers_are_shown_as_torch_shows_them(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    patterns = range(256) if size == 1 else range(0, 256**size, 256**size // 4096)
    bits = np.array(patterns, f"u{size}")
    tensor = torch.frombuffer(bytearray(bits.tobytes()), dtype=dtype)
    for element, (pattern, number) in enumerate(zip(bits, tensor, strict=True)):
        difference = Difference(element, pattern, bits[0])
        assert describe(difference, (len(bits),), str(dtype).removeprefix("torch.")).endswith(
            f" from the source {number.item()} (0x{int(pattern):0{2 * size}x})."
        )


def test_a_float_that_numpy_lacks_is_shown_as_bits_where_there_is_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no', name='torch')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from lorashard.verify.reference.values import Difference, describe
bits = np.array([0x38, 0x39], np.uint8)
text = describe(Difference(5, *bits), (2, 3), "float8_e4m3fn")
assert text == "[1, 2] is 0x39, from the source 0x38.", text
"""
    imported_by(code)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_elements", [0, 1, 7, 8, 9, 24])
def test_the_first_of_all_elements_that_differ_is_found(
    monkeypatch: pytest.MonkeyPatch, size: int, num_elements: int
) -> None:
    monkeypatch.setattr(values, "_CHUNK_BYTES", 8 * size)
    expected: Bits = np.arange(num_elements, dtype=f"u{size}")
    assert differences(expected, expected) == []
    for wrong in range(num_elements):
        actual = expected.copy()
        actual[wrong:] ^= 1
        first, *others = differences(expected, actual)
        assert first == Difference(wrong, expected[wrong], actual[wrong])
        assert [other.element for other in others] == [
            n for n in (8, 16) if wrong < n < num_elements
        ]


def differences(expected: Bits, actual: Bits) -> list[Difference]:
    """The first one of each chunk."""
    chunks = differing_chunks(reading(expected), reading(actual), len(expected), expected.itemsize)
    found = [first_of(begin, *both) for begin, *both in chunks]
    assert None not in found
    return [difference for difference in found if difference]


def reading(bits: Bits) -> Fill:
    def fill(begin: int, out: Bits) -> None:
        out[:] = bits[begin : begin + len(out)]

    return fill


def test_a_file_that_ends_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(4096)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    most, all_of_it = np.empty(4095, np.uint32), np.empty(4096, np.uint32)
    file.read_into("weight", 0, most)
    assert (most.view(np.float32) == 1).all()
    with pytest.raises(AdapterError, match=r"weights\.safetensors: ended while weight was read"):
        file.read_into("weight", 0, all_of_it)
