"""The two forms that an adapter's weights come in, read one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lorashard.errors import AdapterError, UnsupportedAdapterError

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFile:
    """Named tensors on disk, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Open a safetensors file. Raises AdapterError if that fails."""
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415

        open_file: Any = safe_open  # its stub has no types
        self.name = path.name
        try:
            self._file = open_file(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as err:
            raise AdapterError(f"{path}: {err}.", hint="Copy or download it again.") from err
        names: list[str] = self._file.keys()
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


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
