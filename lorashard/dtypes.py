"""The one table of dtypes, by the names that safetensors gives them. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args


class _Dtype(NamedTuple):
    """bits: of an element. torch: its name there. exponent: see EXPONENT_BITS.

    The last two are for the floats that LoRA factors are stored in.
    """

    bits: int
    torch: str | None = None
    exponent: int | None = None


# The reference writer puts tensors of the last of these dtypes first, and so on.
_DTYPES: Mapping[str, _Dtype] = {
    "BOOL": _Dtype(8),
    "F4": _Dtype(4),
    "F6_E2M3": _Dtype(6),
    "F6_E3M2": _Dtype(6),
    "U8": _Dtype(8),
    "I8": _Dtype(8),
    "F8_E5M2": _Dtype(8, "float8_e5m2", 0x7C),
    # It has no infinity, and a NaN has every bit but the sign set, so the mantissa is in the mask.
    "F8_E4M3": _Dtype(8, "float8_e4m3fn", 0x7F),
    "F8_E8M0": _Dtype(8),
    "F8_E4M3FNUZ": _Dtype(8),
    "F8_E5M2FNUZ": _Dtype(8),
    "I16": _Dtype(16),
    "U16": _Dtype(16),
    "F16": _Dtype(16, "float16", 0x7C00),
    "BF16": _Dtype(16, "bfloat16", 0x7F80),
    "I32": _Dtype(32),
    "U32": _Dtype(32),
    "F32": _Dtype(32, "float32", 0x7F80_0000),
    "C64": _Dtype(64),
    "F64": _Dtype(64, "float64", 0x7FF0_0000_0000_0000),
    "I64": _Dtype(64),
    "U64": _Dtype(64),
}

ELEMENT_BITS: Mapping[str, int] = {name: dtype.bits for name, dtype in _DTYPES.items()}
# In bytes, of those that have whole ones.
ELEMENT_SIZE: Mapping[str, int] = {
    name: bits // 8 for name, bits in ELEMENT_BITS.items() if bits % 8 == 0
}
# Wider dtypes come first in a file, so that every tensor is aligned to its element size.
FILE_ORDER: Mapping[str, int] = {name: place for place, name in enumerate(reversed(tuple(_DTYPES)))}
TORCH_DTYPES: Mapping[str, str] = {n: d.torch for n, d in _DTYPES.items() if d.torch is not None}
FROM_TORCH: Mapping[str, str] = {torch: name for name, torch in TORCH_DTYPES.items()}
# The bits that are all set in an infinity and in a NaN, and in no other value.
EXPONENT_BITS: Mapping[str, int] = {
    name: dtype.exponent for name, dtype in _DTYPES.items() if dtype.exponent is not None
}
FLOAT_DTYPES = frozenset(TORCH_DTYPES)


def name_of_torch(dtype: object) -> str | None:
    """What safetensors calls a torch dtype: torch.int64 -> I64; None for one that it has not."""
    name = str(dtype).removeprefix("torch.")
    known = FROM_TORCH.get(name, name.upper().replace("UINT", "U").replace("INT", "I"))
    return known if known in ELEMENT_SIZE else None


# What `--dtype` takes, by torch's name, and what safetensors calls it.
CastDtype = Literal["float32", "float16", "bfloat16"]
CAST_DTYPES: Mapping[str, str] = {torch: FROM_TORCH[torch] for torch in get_args(CastDtype)}
