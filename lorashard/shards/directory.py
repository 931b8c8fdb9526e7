"""Open a finished shard directory and read tensors from it. No torch unless a tensor is asked for.

shards = open_shards("adapter-ep2")
shards.placement.ranks[0]                 # global expert ids of ep rank 0, in slot order
rank = shards.rank(0)
rank.tensor("model.layers.3.mlp.experts.gate_proj.lora_A")     # torch [E_local, r, H]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import HeaderError, LorashardError, ManifestError, ShardError
from lorashard.header import TensorEntry
from lorashard.shards.manifest import (
    FileDigest,
    Manifest,
    ModuleInfo,
    ShardFile,
    format_manifest,
    parse_manifest,
)
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME, rank_file_name
from lorashard.shards.placement import Placement
from lorashard.storage.local import LocalFile, write_synced
from lorashard.storage.remote import Location, RemoteFile, RemoteFolder
from lorashard.storage.safetensors_file import read_header

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


_REPORT = "A fault of lorashard; please report it. Nothing was written."


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a shard directory. Raises ManifestError if it has none, or a damaged one."""
    return parse_manifest(manifest_bytes(directory), f"{directory}/{MANIFEST_NAME}")


def manifest_bytes(directory: Location) -> bytes:
    """The manifest as it stands there. Raises ManifestError if there is none."""
    if isinstance(directory, RemoteFolder):
        file = directory.file(MANIFEST_NAME)
        if file is None:
            raise ManifestError(
                f"{directory}/{MANIFEST_NAME}",
                "no such file",
                hint="Is the name right, and is it a shard directory, as `lorashard split` writes it?",
            )
        return file.read(0, file.size_bytes)
    path = directory / MANIFEST_NAME
    try:
        return path.read_bytes()
    except OSError as err:
        reason = "not a finished shard directory" if directory.is_dir() else "no such directory"
        raise ManifestError(path, reason) from err


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write lorashard.json and sync it, once it is known to be read as what it was made of."""
    content, path = format_manifest(manifest), directory / MANIFEST_NAME
    if parse_manifest(content, str(path)) != manifest:
        raise ManifestError(path, "would be read otherwise than it was written", hint=_REPORT)
    write_synced(path, content)


def has_manifest(place: Location) -> bool:
    """Whether a place is a shard directory rather than an adapter."""
    if isinstance(place, RemoteFolder):
        return place.has(MANIFEST_NAME)
    return (place / MANIFEST_NAME).exists()


def is_shard_directory(path: Path, names: frozenset[str]) -> bool:
    """Whether `path`, with `names` in it, is a finished shard directory and nothing else."""
    try:
        return names <= {MANIFEST_NAME, CONFIG_NAME, *read_manifest(path).files}
    except LorashardError:
        return False


def needed_files(manifest: Manifest, ep_ranks: Sequence[int], where: str) -> dict[str, FileDigest]:
    """The files beside the manifest that these ranks need. Raises ShardError for a wrong rank."""
    ep_size = manifest.placement.ep_size
    for ep_rank in ep_ranks:
        if not 0 <= ep_rank < ep_size:
            raise ShardError(
                f"{where}: no ep rank {ep_rank}; it is cut for {ep_size}, 0 to {ep_size - 1}."
            )
    names = [REPLICATED_NAME, *(rank_file_name(k, ep_size) for k in sorted(set(ep_ranks)))]
    config = manifest.source.files[CONFIG_NAME]
    return {CONFIG_NAME: config} | {name: manifest.files[name].digest for name in names}


def find_file(source: RemoteFolder, name: str, digest: FileDigest) -> RemoteFile:
    """A file of a shard directory. Raises ShardError if it is not there, or of another size."""
    file = source.file(name)
    if file is None:
        raise ShardError(f"{source}: no {name}.", hint="Upload the whole directory again.")
    if file.size_bytes != digest.size_bytes:
        raise ShardError(
            f"{file.name}: {file.size_bytes} bytes, the manifest says {digest.size_bytes}.",
            hint="Upload the whole directory again; its files belong together.",
        )
    return file
