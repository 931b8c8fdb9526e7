"""Values as bits: integers, so that NaN equals itself and -0.0 is not 0.0.

torch is imported only for what numpy does not have: a cast of values, and floats of one byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Bits = npt.NDArray[np.unsignedinteger[Any]]
# Fills an array with the elements from `begin` on, in row-major order.
Fill = Callable[[int, Bits], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element that differs, counted in row-major order, and its bits on both sides."""

    element: int
    expected: Any
    actual: Any


# What `split --dtype` casts: not integers, and no floats that only scales or other chips have.
CASTABLE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_CHUNK_BYTES = 2**19  # two of them stay in the processor's cache


def is_cast(dtype: str, cast: str | None) -> bool:
    """Whether `split --dtype` makes other values of those of this dtype (torch's names)."""
    return cast is not None and dtype != cast and dtype in CASTABLE.values()


def cast_bits(bits: Bits, dtype: str, cast: str) -> Bits:
    """The bits of the same values in another dtype, as torch casts them."""
    import torch

    signed: Any = bits.view(_SIGNED[bits.itemsize])
    values = torch.from_numpy(signed).view(getattr(torch, dtype))
    return bits_of(values.to(getattr(torch, cast)))


def bits_of(tensor: Tensor) -> Bits:
    """The bits of a tensor, one unsigned integer for each element, in the tensor's shape."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = integers[tensor.element_size()]
    array = tensor.detach().contiguous().view(integer).numpy()
    unsigned: Bits = array.view(f"u{array.itemsize}")
    return unsigned


def differing_chunks(
    expected: Fill, actual: Fill, num_elements: int, item_size: int
) -> Iterator[tuple[int, Bits, Bits]]:
    """Compare elements [0, num_elements) of both, and yield (begin, expected, actual) of chunks.

    The arrays are valid until the next one is asked for.
    """
    length = min(num_elements, _CHUNK_BYTES // item_size)
    wanted, found = np.empty(length, f"u{item_size}"), bytearray(length * item_size)
    for begin in range(0, num_elements, max(1, length)):
        if num_elements - begin < length:
            length = num_elements - begin
            wanted, found = wanted[:length], bytearray(length * item_size)
        elements: Bits = np.frombuffer(found, wanted.dtype)
        expected(begin, wanted)
        actual(begin, elements)
        if not are_equal(found, wanted):
            yield begin, wanted, elements


def are_equal(data: bytearray, bits: Bits) -> bool:
    """Whether two areas of memory are equal; `bits` is contiguous.

    A bytearray compares at once. numpy makes an array of the results, and lets other threads have
    the interpreter twice, which costs more time than it takes to compare.
    """
    return data == bits.data


def first_of(begin: int, expected: Bits, actual: Bits) -> Difference | None:
    """The first difference of two arrays, which begin with element `begin`."""
    differ = expected != actual
    if not differ.any():
        return None
    place = int(differ.argmax())
    return Difference(begin + place, expected[place], actual[place])


def describe(difference: Difference, shape: tuple[int, ...], dtype: str) -> str:
    """Where a tensor or matrix of this shape and dtype differs, with numbers and bits."""
    place = [int(index) for index in np.unravel_index(difference.element, shape)]
    source, shard = (_show(bits, dtype) for bits in (difference.expected, difference.actual))
    return f"{place} is {shard}, from the source {source}."


def _show(bits: Any, dtype: str) -> str:
    pattern = f"0x{int(bits):0{2 * bits.itemsize}x}"
    try:
        return f"{_value_of(bits, dtype)} ({pattern})"
    except ModuleNotFoundError:  # no torch, and the bits say it too
        return pattern


def _value_of(bits: Any, dtype: str) -> Any:
    if dtype == "bfloat16":  # the upper half of a float32
        return np.uint32(int(bits) << 16).view(np.float32).item()
    if not dtype.startswith("float8"):
        return bits.view(np.dtype(dtype)).item()
    import torch

    return torch.tensor(int(bits), dtype=torch.uint8).view(getattr(torch, dtype)).item()
