"""The two forms that an adapter's weights come in, read one tensor at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lorashard.errors import AdapterError, UnsupportedAdapterError

if TYPE_CHECKING:
    from torch import Tensor


_TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
_PARTS_OF_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class SafetensorsFile:
    """Named tensors on disk, read one at a time.

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
            with open_file(path, framework="pt", device="cpu"):
                pass
        except (OSError, SafetensorError) as err:
            raise AdapterError(f"{path}: {err}.", hint="Copy or download it again.") from err
        (length,) = struct.unpack("<Q", self._file.read(8))
        self._data_begin = 8 + length
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self.shapes = {name: tuple(info["shape"]) for name, info in self._header.items()}

    def get(self, name: str) -> Tensor:
        """Read one tensor; one whose elements are parts of a byte comes as its bytes."""
        import torch

        info = self._header[name]
        begin, end = info["data_offsets"]
        is_bytes = info["dtype"] in _PARTS_OF_A_BYTE
        dtype = torch.uint8 if is_bytes else getattr(torch, _TORCH_DTYPES[info["dtype"]])
        shape = [end - begin] if is_bytes else info["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(end - begin)
        self._file.seek(self._data_begin + begin)
        done = 0
        while done < len(data):
            count = self._file.readinto(memoryview(data)[done:])
            if not count:
                raise AdapterError(f"{self.name}: ended while {name} was read.")
            done += count
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


class PickledTensors:
    """The same for an unpickled adapter, which is in memory as a whole."""

    def __init__(self, path: Path) -> None:
        """Unpickle tensors, and nothing else, from `path`. Raises AdapterError if that fails."""
        import torch

        self.name = path.name
        self._tensors: dict[str, Tensor]
        try:
            self._tensors = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, UnpicklingError) as err:
            raise AdapterError(f"{path}: {err}.", hint="Copy or download it again.") from err
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """Give one tensor."""
        return self._tensors[name]


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
            hint="--allow-pickle reads it with torch.load(weights_only=True).",
        )
    return PickledTensors(pickled)
