"""What lorashard.json says, and Manifest -> canonical JSON. Pure. docs/format.md is the contract.

`manifest_parser` reads the JSON back.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from lorashard.adapter.keys import Projection
from lorashard.adapter.options import LayoutOptions
from lorashard.header import TensorEntry
from lorashard.shards.placement import Placement
from lorashard.shards.seal import seal

FORMAT = "lorashard"
FORMAT_VERSION = 1
_INLINE_WIDTH = 160


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size in bytes and BLAKE3 in hex of one file."""

    size_bytes: int
    blake3: str


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of the directory; `tensors` are in file order, offsets from the file's start."""

    digest: FileDigest
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One experts container as docs/format.md describes it."""

    layout: str
    source_layout: str
    gate_up: str
    lora_rank: int
    scaling: Mapping[Projection, float | tuple[float, ...]]
    absent_experts: tuple[int, ...]
    expert_lora_ranks: Mapping[Projection, Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Where the shards come from. `header` is the source file's start, needed to merge."""

    repo: str | None
    revision: str | None
    files: Mapping[str, FileDigest]
    header: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Manifest:
    """Everything that lorashard.json says.

    dtype: what the values were cast to, as a safetensors name; None = nothing was cast.
    options: those of the layout detection, with the number of experts filled in.
    """

    lorashard_version: str
    source: SourceInfo
    options: LayoutOptions
    dtype: str | None
    gate_up_known: bool
    placement: Placement
    modules: Mapping[str, ModuleInfo]
    files: Mapping[str, ShardFile]

    def __repr__(self) -> str:
        """Short, as the tables of a large adapter are megabytes of text."""
        placed = self.placement
        return (
            f"Manifest({placed.num_experts} experts in {len(self.modules)} modules, "
            f"{placed.strategy} on {placed.ep_size} ranks)"
        )


def format_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON: same manifest, same bytes."""
    source = manifest.source
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "lorashard_version": manifest.lorashard_version,
        "source": {
            "repo": source.repo,
            "revision": source.revision,
            "files": {name: _digest_json(digest) for name, digest in source.files.items()},
            "header": _compressed(source.header),
        },
        "options": asdict(manifest.options)
        | {"dtype": manifest.dtype, "gate_up_known": manifest.gate_up_known},
        "placement": _placement_json(manifest.placement),
        "modules": {name: _module_json(module) for name, module in manifest.modules.items()},
        "files": {
            name: _digest_json(file.digest)
            | {"tensors": {entry.name: _tensor_json(entry) for entry in file.tensors}}
            for name, file in manifest.files.items()
        },
    }
    return seal((_pretty(document, "") + "\n").encode())


@lru_cache(2)  # a training publishes the same header again and again
def _compressed(header: bytes) -> str:
    return base64.b64encode(zlib.compress(header, 6)).decode()


def _placement_json(placement: Placement) -> dict[str, Any]:
    info: dict[str, Any] = {
        "strategy": placement.strategy,
        "ep_size": placement.ep_size,
        "num_experts": placement.num_experts,
        "ranks": placement.ranks,
    }
    return info | ({"layers": dict(placement.layers)} if placement.layers else {})


def _module_json(module: ModuleInfo) -> dict[str, Any]:
    info = asdict(module)
    odd_ranks = info.pop("expert_lora_ranks")
    if odd_ranks:  # keys of a JSON object are strings
        info["expert_lora_ranks"] = {
            projection: {str(expert): lora_rank for expert, lora_rank in odd.items()}
            for projection, odd in odd_ranks.items()
        }
    return info


def _digest_json(digest: FileDigest) -> dict[str, Any]:
    return {"size": digest.size_bytes, "blake3": digest.blake3}


def _tensor_json(entry: TensorEntry) -> dict[str, Any]:
    return {
        "dtype": entry.dtype,
        "shape": entry.shape,
        "offset": entry.begin,
        "size": entry.size_bytes,
    }


def _pretty(value: Any, indent: str) -> str:
    """Indented JSON that keeps what fits on a line, and every list of numbers, on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    scalars = isinstance(value, (list, tuple)) and not any(
        isinstance(v, (list, tuple, dict)) for v in value
    )
    if (
        scalars
        or not value
        or not isinstance(value, (dict, list, tuple))
        or len(flat) <= _INLINE_WIDTH
    ):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items = [
            f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, inner)}" for k, v in value.items()
        ]
    else:
        items = [_pretty(v, inner) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"
