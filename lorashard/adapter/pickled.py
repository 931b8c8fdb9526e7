"""adapter_model.bin -> a temporary adapter_model.safetensors, only when the user allows pickles."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.errors import AdapterError
from lorashard.header import GIT_LFS_POINTER
from lorashard.storage.small_files import is_git_lfs_pointer
from lorashard.storage.torch_import import import_torch

if TYPE_CHECKING:
    import torch


@contextmanager
def convert_pickle(directory: Path) -> Iterator[Path]:
    """Yield a temporary adapter directory with the same tensors in safetensors form.

    The pickle is read with weights_only=True: tensors and plain containers, no code.
    Raises AdapterError if it holds anything else.
    """
    torch = import_torch("reading a pickle")
    from safetensors.torch import save_file  # noqa: PLC0415

    path = directory / PICKLE_NAME
    with path.open("rb") as file:
        if is_git_lfs_pointer(file.read(64)):
            raise AdapterError(f"{path}: {GIT_LFS_POINTER}.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:
        # A damaged pickle can raise anything. torch's own message recommends weights_only=False,
        # so it is not shown.
        raise AdapterError(
            f"{path}: cannot be read as plain tensors ({type(err).__name__}).",
            hint="Save the adapter again with safe_serialization=True.",
        ) from err
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) and _is_plain(value)
        for name, value in loaded.items()
    ):
        raise AdapterError(f"{path}: not a table of plain tensors.", hint="Is it a PEFT adapter?")
    _refuse_repeated_elements(loaded, path)
    with tempfile.TemporaryDirectory(prefix="lorashard-") as folder:
        converted = Path(folder)
        shutil.copyfile(directory / CONFIG_NAME, converted / CONFIG_NAME)
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in loaded.items()}
        save_file(tensors, converted / WEIGHTS_NAME, metadata={"format": "pt"})
        del loaded, tensors
        (converted / PICKLE_NAME).symlink_to(path.resolve())
        yield converted


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


def pickle_digest(directory: Path) -> tuple[int, str] | None:
    """(size, BLAKE3 hex) of the pickle that a converted directory was made from."""
    path = directory / PICKLE_NAME
    if not path.is_symlink():
        return None
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return path.stat().st_size, digest.hexdigest()
