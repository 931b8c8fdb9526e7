"""adapter_model.bin -> its tensors as the bytes of a safetensors file, only when the user allows pickles.

The pickle is held in memory once; no file is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from lorashard.adapter.tensor_file import TensorFile
from lorashard.errors import AdapterError
from lorashard.header import GIT_LFS_POINTER
from lorashard.storage.local import open_regular, watch_file
from lorashard.storage.packages import import_package
from lorashard.storage.small_files import is_git_lfs_pointer

if TYPE_CHECKING:
    import torch


class PickledTensors(TensorFile):
    """A ByteSource: the safetensors file that the tensors of a pickle would make.

    The pickle is read with weights_only=True: tensors and plain containers, no code.
    Raises AdapterError if it holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched = watch_file(path)
        super().__init__(str(path), _load(path))

    def check_unchanged(self) -> None:
        """Raise AdapterError if the pickle is another one by now, or was written to."""
        self._watched.check_unchanged()

    def digest(self) -> tuple[int, str]:
        """(size, BLAKE3 hex) of the pickle itself."""
        digest = blake3(max_threads=blake3.AUTO)
        digest.update_mmap(self.path)
        return self.path.stat().st_size, digest.hexdigest()


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    torch = import_package("torch", "reading a pickle")
    try:
        file = os.fdopen(open_regular(path), "rb")
    except OSError as err:
        raise AdapterError(f"{path}: {err.strerror}.", hint="Check the path.") from err
    try:
        with file:
            is_pointer = is_git_lfs_pointer(file.read(64))
            file.seek(0)
            # Not mmap=True: a trainer that writes the file again would then kill this process
            # (SIGBUS).
            loaded = None if is_pointer else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as err:
        # A damaged pickle can raise anything. torch's own message recommends weights_only=False,
        # so it is not shown.
        raise AdapterError(
            f"{path}: cannot be read as plain tensors ({type(err).__name__}).",
            hint="Save the adapter again with safe_serialization=True.",
        ) from err
    if is_pointer:
        raise AdapterError(f"{path}: {GIT_LFS_POINTER}.")
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) and _is_plain(value)
        for name, value in loaded.items()
    ):
        raise AdapterError(f"{path}: not a table of plain tensors.", hint="Is it a PEFT adapter?")
    _refuse_repeated_elements(loaded, path)
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _refuse_repeated_elements(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A tensor of stride 0 can be of any size, and needs it all once it is copied."""
    for name, tensor in tensors.items():
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > stored:
            raise AdapterError(
                f"{path}: tensor {name!a} {list(tensor.shape)} is larger than the {stored} bytes "
                "stored for it.",
                hint="Save the adapter again with safe_serialization=True.",
            )


def _is_plain(tensor: torch.Tensor) -> bool:
    on_disk = tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided"
    return on_disk and not tensor.is_complex() and not tensor.is_quantized
