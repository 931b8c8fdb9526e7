"""Open a finished shard directory and read tensors from it. No torch unless a tensor is asked for.

shards = open_shards("adapter-ep2")
shards.placement.ranks[0]                 # global expert ids of ep rank 0, in slot order
rank = shards.rank(0)
rank.tensor("model.layers.3.mlp.experts.gate_proj.lora_A")     # torch [E_local, r, H]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorashard.errors import HeaderError, ShardError
from lorashard.header import TensorEntry
from lorashard.manifest import Manifest, ModuleInfo, ShardFile
from lorashard.pipeline import read_manifest
from lorashard.placement import Placement
from lorashard.plan import REPLICATED_NAME, rank_file_name
from lorashard.read import read_header
from lorashard.sources import LocalFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file of a shard directory, its header checked against the manifest."""

    path: Path
    entries: Mapping[str, TensorEntry]

    def read_bytes(self, name: str) -> bytes:
        """A tensor's bytes, row-major, little-endian. Raises KeyError for an unknown name."""
        entry = self.entries[name]
        buffer = bytearray(entry.size_bytes)
        file = LocalFile(self.path)
        try:
            file.read_into(memoryview(buffer), entry.begin)
        finally:
            file.close()
        return bytes(buffer)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, with torch. Raises KeyError for an unknown name."""
        from safetensors import safe_open  # noqa: PLC0415

        if name not in self.entries:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True, slots=True)
class ShardDirectory:
    """A finished shard directory. Opening it reads the manifest only."""

    path: Path
    manifest: Manifest

    @property
    def placement(self) -> Placement:
        """Which global experts stand on which ep rank, in which slot."""
        return self.manifest.placement

    @property
    def modules(self) -> Mapping[str, ModuleInfo]:
        """The experts containers by name: layout, gate_up, scaling, untrained experts."""
        return self.manifest.modules

    def rank(self, ep_rank: int) -> TensorFile:
        """The experts of one ep rank: tensors [E_local, ...]. Raises ShardError."""
        if not 0 <= ep_rank < self.placement.ep_size:
            raise ShardError(
                f"{self.path}: no ep rank {ep_rank}; there are {self.placement.ep_size}."
            )
        return self._open(rank_file_name(ep_rank, self.placement.ep_size))

    def replicated(self) -> TensorFile:
        """What every rank needs beside its experts. Raises ShardError."""
        return self._open(REPLICATED_NAME)

    def _open(self, name: str) -> TensorFile:
        check_file(self.path / name, self.manifest.files[name])
        return TensorFile(
            self.path / name, {entry.name: entry for entry in self.manifest.files[name].tensors}
        )


def open_shards(path: str | os.PathLike[str]) -> ShardDirectory:
    """Open a shard directory. Raises ManifestError if it is not a finished one."""
    directory = Path(path)
    return ShardDirectory(directory, read_manifest(directory))


def check_file(path: Path, recorded: ShardFile) -> None:
    """Raise ShardError unless the file has the size and the header that the manifest records."""
    try:
        with reading_shards():
            _, header = read_header(path)
    except OSError as err:
        raise ShardError(
            f"{path}: {os.strerror(err.errno or 0)}.", hint="Copy the directory again."
        ) from err
    if header.file_size != recorded.digest.size_bytes:
        raise ShardError(
            f"{path}: {header.file_size} bytes, the manifest says {recorded.digest.size_bytes}.",
            hint="Copy the file again; it is another one or cut short.",
        )
    if "ep_rank" in header.metadata:
        ep_rank, ep_size = header.metadata["ep_rank"], header.metadata.get("ep_size", "")
        written_as = f"ep-{ep_rank.zfill(5)}-of-{ep_size.zfill(5)}.safetensors"
        if path.name != written_as:
            raise ShardError(
                f"{path}: was written as {written_as}.",
                hint="Files of ranks are swapped; copy the directory again.",
            )
    if header.tensors != recorded.tensors:
        raise ShardError(
            f"{path}: its tensors are not those of the manifest.",
            hint="The file belongs to another directory; copy the right one.",
        )


@contextmanager
def reading_shards() -> Iterator[None]:
    """What goes wrong while a shard file is read is a fault of the shards."""
    try:
        yield
    except HeaderError as err:
        raise ShardError(f"{err.path}: {err.reason}.", hint="Copy the file again.") from err
