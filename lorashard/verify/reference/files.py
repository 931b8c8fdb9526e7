"""The two forms that an adapter's weights come in, read a range of a tensor's elements at a time."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.verify.reference.values import Bits, bits_of

# By torch's names, and in bytes.
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "BOOL": ("bool", 1), "C64": ("complex64", 8),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
}  # fmt: skip
_PARTS_OF_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class SafetensorsFile:
    """Named tensors on disk, for several threads.

    `shapes`, `dtypes` (torch's names) and `item_sizes` (bytes) are by name. A tensor whose elements
    are parts of a byte counts as one of bytes.

    safetensors itself checks the file. Its tensors are views of a mapping of the whole file, whose
    pages would all count as this process's memory, so the bytes are read here, from the offsets in
    the header.
    """

    def __init__(self, path: Path) -> None:
        """Open a safetensors file. Raises AdapterError if that fails."""
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415

        open_file: Any = safe_open  # its stub has no types
        self.name = path.name
        try:
            self._file = path.open("rb", buffering=0)  # it says why not, safe_open does not
            with open_file(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as err:
            raise AdapterError(f"{path}: {err}.", hint="Copy or download it again.") from err
        (length,) = struct.unpack("<Q", self._read(0, 8))
        header: dict[str, Any] = json.loads(self._read(8, length))
        header.pop("__metadata__", None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.item_sizes: dict[str, int] = {}
        self._begins: dict[str, int] = {}
        for name, info in header.items():
            begin, end = info["data_offsets"]
            is_bytes = info["dtype"] in _PARTS_OF_A_BYTE
            self.shapes[name] = (end - begin,) if is_bytes else tuple(info["shape"])
            self.dtypes[name], size = ("uint8", 1) if is_bytes else _DTYPES[info["dtype"]]
            self.item_sizes[name], self._begins[name] = size, 8 + length + begin

    def read_into(self, name: str, begin: int, out: Bits) -> None:
        """Fill `out` with the bits of a tensor's elements from `begin` on."""
        offset = self._begins[name] + begin * self.item_sizes[name]
        self._fill(out.data.cast("B"), offset, name)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data), offset, "the header")
        return data

    def _fill(self, data: memoryview, offset: int, what: str) -> None:
        while data:
            try:
                count = os.preadv(self._file.fileno(), [data], offset)
            except OSError as err:
                raise AdapterError(f"{self.name}: cannot be read ({err.strerror}).") from err
            if not count:
                raise AdapterError(f"{self.name}: ended while {what} was read.")
            data, offset = data[count:], offset + count


class PickledTensors:
    """The same for an unpickled adapter, which is in memory as a whole."""

    def __init__(self, path: Path) -> None:
        """Unpickle tensors, and nothing else, from `path`. Raises AdapterError if that fails."""
        import torch

        self.name = path.name
        try:
            self._tensors = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, UnpicklingError) as err:
            raise AdapterError(f"{path}: {err}.", hint="Copy or download it again.") from err
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._bits: dict[str, Bits] = {}
        self.dtypes, self.item_sizes = {}, {}
        for name, tensor in self._tensors.items():
            self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            self.item_sizes[name] = tensor.element_size()

    def read_into(self, name: str, begin: int, out: Bits) -> None:
        """Fill `out` with the bits of a tensor's elements from `begin` on."""
        if name not in self._bits:
            # Only now: its shape is known to be right, and not that of a few bytes repeated.
            self._bits[name] = bits_of(self._tensors[name]).reshape(-1)
        out[:] = self._bits[name][begin : begin + len(out)]


def read_file(path: Path) -> bytes:
    """A small file. Raises AdapterError."""
    try:
        return path.read_bytes()
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read ({err.strerror}).") from err


def load_source(
    adapter_dir: Path, *, allow_pickle: bool = False
) -> SafetensorsFile | PickledTensors:
    """Open the adapter's weights. Raises UnsupportedAdapterError for a pickle not allowed."""
    weights, pickled = adapter_dir / "adapter_model.safetensors", adapter_dir / "adapter_model.bin"
    for path in (weights, pickled):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise AdapterError(f"{path}: a pipe or a device, not a file.", hint="Check the path.")
    if weights.is_file():
        return SafetensorsFile(weights)
    if not pickled.is_file():
        raise AdapterError(f"{adapter_dir}: no {weights.name}.", hint="Is the download complete?")
    if not allow_pickle:
        raise UnsupportedAdapterError(
            f"{pickled.name} (a pickle)",
            str(adapter_dir),
            hint="`allow_pickle=True` reads it with torch.load(weights_only=True).",
        )
    return PickledTensors(pickled)
