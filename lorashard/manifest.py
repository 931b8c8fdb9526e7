"""lorashard.json: Manifest <-> canonical JSON. Pure. docs/format.md is the contract.

What is read here comes from a file that may be damaged or hostile, so every field is checked, and
no file name in it is ever used as a path: the names follow from ep_size alone.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from lorashard.errors import ManifestError
from lorashard.header import MAX_HEADER_BYTES, TensorEntry
from lorashard.keys import Projection
from lorashard.options import LayoutOptions
from lorashard.placement import Placement, Ranks
from lorashard.plan import REPLICATED_NAME, rank_file_name

MANIFEST_NAME = "lorashard.json"
FORMAT = "lorashard"
FORMAT_VERSION = 1
_INLINE_WIDTH = 160
# A later lorashard may record more options; those that change the layout change the digests too.
_OPTION_NAMES = tuple(field.name for field in fields(LayoutOptions))
_HEX_DIGEST = re.compile("[0-9a-f]{64}")


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that lorashard.json says.

    dtype: what the values were cast to, as a safetensors name; None = nothing was cast.
    options: what layout detection was told, with the expert count resolved.
    """

    lorashard_version: str
    source: SourceInfo
    options: LayoutOptions
    dtype: str | None
    gate_up_known: bool
    placement: Placement
    modules: Mapping[str, ModuleInfo]
    files: Mapping[str, ShardFile]


def shard_file_names(ep_size: int) -> tuple[str, ...]:
    """The tensor files of a directory: the replicated one, then one per ep rank."""
    return (REPLICATED_NAME, *(rank_file_name(rank, ep_size) for rank in range(ep_size)))


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
            "header": base64.b64encode(zlib.compress(source.header, 6)).decode(),
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
    return (_pretty(document, "") + "\n").encode()


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Read and check a manifest. Raises ManifestError with what is wrong."""
    try:
        return _parse(json.loads(raw), path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as err:
        raise ManifestError(path, f"damaged ({type(err).__name__}: {err})") from err


def _fail(path: str, reason: str) -> NoReturn:
    raise ManifestError(path, reason)


def _parse(document: Mapping[str, Any], path: str) -> Manifest:
    if document.get("format") != FORMAT:
        _fail(path, "not a lorashard manifest")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            path,
            f"format version {version}, this lorashard reads {FORMAT_VERSION}",
            hint="Install the lorashard that wrote it, or split again with this one.",
        )
    placement = _parse_placement(document["placement"], path)
    expected = shard_file_names(placement.ep_size)
    if set(document["files"]) != set(expected):
        _fail(path, f"files are not {expected[0]} ... {expected[-1]}")
    options = dict(document["options"])
    source = document["source"]
    return Manifest(
        lorashard_version=str(document["lorashard_version"]),
        source=SourceInfo(
            repo=source["repo"],
            revision=source["revision"],
            files={name: _parse_digest(info, path) for name, info in source["files"].items()},
            header=_parse_source_header(source["header"], path),
        ),
        dtype=options.pop("dtype"),
        gate_up_known=bool(options.pop("gate_up_known")),
        options=LayoutOptions(**{name: options.get(name) for name in _OPTION_NAMES}),
        placement=placement,
        modules={name: _parse_module(info) for name, info in document["modules"].items()},
        files={name: _parse_file(document["files"][name], path) for name in expected},
    )


def _parse_source_header(text: str, path: str) -> bytes:
    unpacker = zlib.decompressobj()
    header = unpacker.decompress(base64.b64decode(text, validate=True), MAX_HEADER_BYTES + 8)
    if not unpacker.eof:
        _fail(path, "the source header in it is too large or cut short")
    return header


def _parse_placement(info: Mapping[str, Any], path: str) -> Placement:
    def ranks(rows: Any) -> Ranks:
        parsed = tuple(tuple(_natural(expert, path) for expert in row) for row in rows)
        if len(parsed) != info["ep_size"]:
            _fail(path, f"placement lists {len(parsed)} ranks, ep_size is {info['ep_size']}")
        experts = {expert for row in parsed for expert in row}
        if experts != set(range(info["num_experts"])):
            _fail(path, f"placement does not cover experts 0 to {info['num_experts'] - 1}")
        return parsed

    if info["strategy"] not in ("linear", "round_robin", "explicit"):
        _fail(path, f"placement strategy {info['strategy']!r} is not known")
    layers = {name: ranks(rows) for name, rows in info.get("layers", {}).items()}
    return Placement(info["strategy"], info["num_experts"], ranks(info["ranks"]), layers)


def _parse_module(info: Mapping[str, Any]) -> ModuleInfo:
    return ModuleInfo(
        layout=info["layout"],
        source_layout=info["source_layout"],
        gate_up=info["gate_up"],
        lora_rank=info["lora_rank"],
        scaling={p: tuple(s) if isinstance(s, list) else s for p, s in info["scaling"].items()},
        absent_experts=tuple(info["absent_experts"]),
        expert_lora_ranks={
            projection: {int(expert): lora_rank for expert, lora_rank in odd.items()}
            for projection, odd in info.get("expert_lora_ranks", {}).items()
        },
    )


def _parse_file(info: Mapping[str, Any], path: str) -> ShardFile:
    tensors = []
    for name, tensor in info["tensors"].items():
        shape = tuple(_natural(size, path) for size in tensor["shape"])
        begin = _natural(tensor["offset"], path)
        end = begin + _natural(tensor["size"], path)
        tensors.append(TensorEntry(name, str(tensor["dtype"]), shape, begin, end))
    return ShardFile(_parse_digest(info, path), tuple(tensors))


def _parse_digest(info: Mapping[str, Any], path: str) -> FileDigest:
    digest = info["blake3"]
    if not isinstance(digest, str) or not _HEX_DIGEST.fullmatch(digest):
        _fail(path, f"{digest!r} is no BLAKE3 digest")
    return FileDigest(_natural(info["size"], path), digest)


def _natural(value: Any, path: str) -> int:
    if type(value) is not int or value < 0:
        _fail(path, f"{value!r} is not an integer >= 0")
    return value


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
    if not info["expert_lora_ranks"]:
        del info["expert_lora_ranks"]
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
