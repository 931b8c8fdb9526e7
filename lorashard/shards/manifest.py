"""lorashard.json: Manifest <-> canonical JSON. Pure. docs/format.md is the contract.

What is read here comes from a file that may be damaged or hostile, so every field is checked, and
no file name in it is ever used as a path: the names follow from ep_size alone.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, get_args

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.keys import Projection
from lorashard.adapter.modules import PROJECTIONS
from lorashard.adapter.options import (
    ExpertLayout,
    GateUp,
    LayoutOptions,
    LoraBLayout,
    Orientation,
)
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import ManifestError
from lorashard.header import MAX_HEADER_BYTES, TensorEntry
from lorashard.shards.names import shard_file_names
from lorashard.shards.placement import Placement, PlacementKind, Ranks

FORMAT = "lorashard"
FORMAT_VERSION = 1
_INLINE_WIDTH = 160
_MAX_SCALING = 1e12
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
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        zlib.error,
    ) as err:
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
    source, options = document["source"], document["options"]
    files = {name: _parse_digest(info, path) for name, info in source["files"].items()}
    if not {CONFIG_NAME, WEIGHTS_NAME} <= set(files):
        _fail(path, f"source names no {CONFIG_NAME} or {WEIGHTS_NAME}")
    return Manifest(
        lorashard_version=str(document["lorashard_version"]),
        source=SourceInfo(
            repo=_text_or_none(source["repo"], path),
            revision=_text_or_none(source["revision"], path),
            files=files,
            header=_parse_source_header(source["header"], path),
        ),
        dtype=_one_of(options["dtype"], (None, *ELEMENT_SIZE), path),
        gate_up_known=bool(options["gate_up_known"]),
        options=_parse_options(options, path),
        placement=placement,
        modules={name: _parse_module(info, path) for name, info in document["modules"].items()},
        files={name: _parse_file(document["files"][name], path) for name in expected},
    )


def _parse_options(info: Mapping[str, Any], path: str) -> LayoutOptions:
    # A later lorashard may record more options; those that change the layout change the digests.
    counts = {
        name: None if info.get(name) is None else _natural(info[name], path)
        for name in ("num_experts", "hidden_size", "intermediate_size")
    }
    return LayoutOptions(
        **counts,
        gate_up=_one_of(info.get("gate_up"), (None, *get_args(GateUp)), path),
        lora_b_layout=_one_of(info.get("lora_b_layout"), (None, *get_args(LoraBLayout)), path),
        orientation=_one_of(info.get("orientation"), (None, *get_args(Orientation)), path),
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
        if any(len(set(row)) != len(row) for row in parsed):
            _fail(path, "placement has an expert twice on one rank")
        if len(parsed) != info["ep_size"]:
            _fail(path, f"placement lists {len(parsed)} ranks, ep_size is {info['ep_size']}")
        experts = {expert for row in parsed for expert in row}
        if len(experts) != num_experts or max(experts, default=-1) != num_experts - 1:
            _fail(path, f"placement does not cover experts 0 to {num_experts - 1}")
        return parsed

    num_experts = _natural(info["num_experts"], path)

    if info["strategy"] not in get_args(PlacementKind):
        _fail(path, f"placement strategy {info['strategy']!r} is not known")
    layers = {name: ranks(rows) for name, rows in info.get("layers", {}).items()}
    return Placement(info["strategy"], num_experts, ranks(info["ranks"]), layers)


def _parse_module(info: Mapping[str, Any], path: str) -> ModuleInfo:
    return ModuleInfo(
        layout=_one_of(info["layout"], get_args(ExpertLayout), path),
        source_layout=str(info["source_layout"]),
        gate_up=_one_of(info["gate_up"], get_args(GateUp), path),
        lora_rank=_natural(info["lora_rank"], path),
        scaling={
            _one_of(projection, PROJECTIONS, path): tuple(_number(s, path) for s in scale)
            if isinstance(scale, list)
            else _number(scale, path)
            for projection, scale in info["scaling"].items()
        },
        absent_experts=tuple(_natural(expert, path) for expert in info["absent_experts"]),
        expert_lora_ranks={
            _one_of(projection, PROJECTIONS, path): {
                int(expert): _natural(lora_rank, path) for expert, lora_rank in odd.items()
            }
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


def _one_of(value: Any, known: Sequence[Any], path: str) -> Any:
    if isinstance(value, (dict, list)) or value not in known:
        _fail(path, f"{value!r} is not one of {', '.join(map(str, known))}")
    return value


def _text_or_none(value: Any, path: str) -> str | None:
    if value is not None and not isinstance(value, str):
        _fail(path, f"{value!r} is not a text")
    return value


def _number(value: Any, path: str) -> float:
    if type(value) not in (int, float) or not -_MAX_SCALING < value < _MAX_SCALING:
        _fail(path, f"{value!r} is not a scaling")
    number: float = value
    return number


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
