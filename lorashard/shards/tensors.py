"""Read the tensors of a finished shard directory. No torch unless a tensor is asked for.

shards = open_shards("adapter-ep2")
shards.placement.ranks[0]                 # global expert ids of ep rank 0, in slot order
rank = shards.rank(0)
rank.tensor("model.layers.3.mlp.experts.gate_proj.lora_A")     # torch [E_local, r, H]
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lorashard.errors import ShardError, UnknownTensorError
from lorashard.header import TensorEntry
from lorashard.shards.directory import check_file, find_file, locate_shards
from lorashard.shards.manifest import Manifest, ModuleInfo
from lorashard.shards.names import REPLICATED_NAME, rank_file_name
from lorashard.shards.placement import Placement
from lorashard.storage.local import LocalFile
from lorashard.storage.packages import import_package
from lorashard.storage.remote import Location, local_copy

if TYPE_CHECKING:
    import torch


class _LocalCopy:
    """One file of a shard directory on this machine, for as long as this object lives."""

    def __init__(self, place: Location, name: str) -> None:
        stack = ExitStack()
        self.path = stack.enter_context(local_copy(place, (name,))) / name
        weakref.finalize(self, stack.close)


@dataclass(frozen=True, slots=True, repr=False)
class TensorFile:
    """One safetensors file of a shard directory, its header checked against the manifest.

    path: the file itself, or the local copy of a remote one. It exists as long as this object.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    _copy: _LocalCopy | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self.entries)} tensors)"

    def read_bytes(self, name: str) -> bytes:
        """A tensor's bytes, row-major, little-endian. Raises UnknownTensorError."""
        entry = self._entry(name)
        buffer = bytearray(entry.size_bytes)
        file = LocalFile(self.path)
        try:
            file.read_into(memoryview(buffer), entry.begin)
        finally:
            file.close()
        return bytes(buffer)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. Raises UnknownTensorError, or MissingPackageError without torch."""
        from safetensors import safe_open  # noqa: PLC0415

        self._entry(name)
        import_package("torch", "a tensor")
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name in self.entries:
            return self.entries[name]
        similar = get_close_matches(name, self.entries, n=1, cutoff=0.8)
        raise UnknownTensorError(
            f"{self.path}: no tensor {name!a}.",
            hint=f"Did you mean {similar[0]!a}?"
            if similar
            else "`entries` has those that there are.",
        )


@dataclass(frozen=True, slots=True, repr=False)
class ShardDirectory:
    """A finished shard directory. Opening it reads the manifest only.

    Of a remote directory, a file is fetched when it is first asked for, and kept as long as this
    object or the file's TensorFile lives (in the Hub's cache: beyond that).
    """

    place: Location
    manifest: Manifest
    _copies: dict[str, _LocalCopy] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"ShardDirectory({str(self.place)!r}, {self.manifest!r})"

    @property
    def path(self) -> Path:
        """The local directory. Raises ShardError for a remote one, which has none."""
        if not isinstance(self.place, Path):
            raise ShardError(
                f"{self.place}: not on this machine.",
                hint="Fetch it with `lorashard pull`, or use the path of one of its files.",
            )
        return self.place

    @property
    def placement(self) -> Placement:
        """Which global experts are on which ep rank, in which slot."""
        return self.manifest.placement

    @property
    def modules(self) -> Mapping[str, ModuleInfo]:
        """The experts containers by name: layout, gate_up, scaling, untrained experts."""
        return self.manifest.modules

    def rank(self, ep_rank: int) -> TensorFile:
        """The experts of one ep rank: tensors [E_local, ...]. Raises ShardError."""
        if not 0 <= ep_rank < self.placement.ep_size:
            raise ShardError(
                f"{self.place}: no ep rank {ep_rank}; there are {self.placement.ep_size}."
            )
        return self._open(rank_file_name(ep_rank, self.placement.ep_size))

    def replicated(self) -> TensorFile:
        """What every rank needs beside its experts. Raises ShardError."""
        return self._open(REPLICATED_NAME)

    def _open(self, name: str) -> TensorFile:
        recorded = self.manifest.files[name]
        entries = {entry.name: entry for entry in recorded.tensors}
        if isinstance(self.place, Path):
            check_file(self.place / name, recorded)
            return TensorFile(self.place / name, entries)
        if name not in self._copies:
            find_file(self.place, name, recorded.digest)
            self._copies[name] = _LocalCopy(self.place, name)
        copy = self._copies[name]
        check_file(copy.path, recorded)
        return TensorFile(copy.path, entries, copy)


def open_shards(path: str | os.PathLike[str]) -> ShardDirectory:
    """Open a shard directory: a path, hf://owner/name[@revision] or another URL.

    Raises ManifestError if it is not a finished one, AdapterError if a remote place does not answer.
    """
    located = locate_shards(path)
    return ShardDirectory(located.place, located.manifest)
