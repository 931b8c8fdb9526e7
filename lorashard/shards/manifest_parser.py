"""lorashard.json -> Manifest. Pure. docs/format.md is the contract.

What is read here comes from a file that may be damaged or hostile, so every field is checked, and
no file name in it is ever used as a path: the names follow from ep_size alone.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.modules import PROJECTIONS
from lorashard.adapter.options import (
    ExpertLayout,
    GateUp,
    LayoutOptions,
    LoraBLayout,
    Orientation,
)
from lorashard.dtypes import ELEMENT_BITS, ELEMENT_SIZE
from lorashard.errors import ManifestError
from lorashard.header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorEntry
from lorashard.rules import DAMAGED_BYTES
from lorashard.shards.manifest import (
    FORMAT,
    FORMAT_VERSION,
    FileDigest,
    Manifest,
    ModuleInfo,
    ShardFile,
    SourceInfo,
)
from lorashard.shards.names import shard_file_names
from lorashard.shards.placement import Placement, PlacementKind, Ranks
from lorashard.storage.small_files import load_writable_json

_MAX_SCALING = 1e12
_DIGEST_LENGTH = 64
_MAX_DIGITS = 9  # of an expert's number
# A header of 138,240 tensors is 21 MB and packs 13 times smaller, even with all offsets alike 47 times.
_MAX_EXPANSION = 64
_SMALL_HEADER_BYTES = 16 * 2**20
_MAX_NATURAL = 2**63 - 1  # bytes of a file


class _FieldError(Exception):
    """A field is missing or wrong; the text says which and why."""


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Read and check a manifest. `path` is for messages. Raises ManifestError with what is wrong."""
    try:
        document = load_writable_json(raw)
    except (ValueError, RecursionError) as err:
        raise ManifestError(path, f"damaged: not JSON ({err})", rule=DAMAGED_BYTES) from err
    try:
        _check_format(document, path)
        return _parse(document)
    except _FieldError as err:
        raise ManifestError(path, str(err), rule=DAMAGED_BYTES) from err


def _check_format(document: Any, path: str) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _FieldError("not a lorashard manifest")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            path,
            f"format version {_shown(version)}; this lorashard reads version {FORMAT_VERSION}",
            hint="Install the lorashard that wrote it, or split again with this one.",
        )


def _parse(document: Mapping[str, Any]) -> Manifest:
    placement = _parse_placement(_object(document, "placement"))
    names = shard_file_names(placement.ep_size)
    files = _object(document, "files")
    if set(files) != set(names):
        raise _FieldError(f"files are not {names[0]} ... {names[-1]}")
    options = _object(document, "options")
    return Manifest(
        lorashard_version=_text(_field(document, "lorashard_version")),
        source=_parse_source(_object(document, "source")),
        dtype=_one_of(_field(options, "dtype"), (None, *ELEMENT_SIZE)),
        gate_up_known=_boolean(_field(options, "gate_up_known")),
        options=_parse_options(options),
        placement=placement,
        modules={
            name: _parse_module(_as_object(info))
            for name, info in _object(document, "modules").items()
        },
        files={name: _parse_file(_as_object(files[name])) for name in names},
    )


def _parse_source(info: Mapping[str, Any]) -> SourceInfo:
    files = {
        name: _parse_digest(_as_object(digest)) for name, digest in _object(info, "files").items()
    }
    if not {CONFIG_NAME, WEIGHTS_NAME} <= set(files):
        raise _FieldError(f"source names no {CONFIG_NAME} or {WEIGHTS_NAME}")
    return SourceInfo(
        repo=_text_or_none(_field(info, "repo")),
        revision=_text_or_none(_field(info, "revision")),
        files=files,
        header=_unpack_header(_text(_field(info, "header"))),
    )


def _unpack_header(text: str) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        packed = base64.b64decode(text, validate=True)
        longest = max(_SMALL_HEADER_BYTES, _MAX_EXPANSION * len(packed))
        header = unpacker.decompress(packed, min(longest, MAX_HEADER_BYTES) + LENGTH_BYTES)
    except (ValueError, zlib.error) as err:
        raise _FieldError(f"damaged: the source header cannot be unpacked ({err})") from err
    if not unpacker.eof:
        raise _FieldError("the source header in it is too large or cut short")
    return header


def _parse_options(info: Mapping[str, Any]) -> LayoutOptions:
    # A later lorashard may record more options; those that change the layout change the digests.
    counts = {
        name: None if _field(info, name) is None else _natural(info[name])
        for name in ("num_experts", "hidden_size", "intermediate_size")
    }
    return LayoutOptions(
        **counts,
        gate_up=_one_of(_field(info, "gate_up"), (None, *get_args(GateUp))),
        lora_b_layout=_one_of(_field(info, "lora_b_layout"), (None, *get_args(LoraBLayout))),
        orientation=_one_of(_field(info, "orientation"), (None, *get_args(Orientation))),
    )


def _parse_placement(info: Mapping[str, Any]) -> Placement:
    ep_size, num_experts = _natural(_field(info, "ep_size")), _natural(_field(info, "num_experts"))
    strategy = _one_of(_field(info, "strategy"), get_args(PlacementKind))
    layers = {
        name: _parse_ranks(rows, ep_size, num_experts)
        for name, rows in _as_object(info.get("layers", {})).items()
    }
    ranks = _parse_ranks(_field(info, "ranks"), ep_size, num_experts)
    return Placement(strategy, num_experts, ranks, layers)


def _parse_ranks(rows: Any, ep_size: int, num_experts: int) -> Ranks:
    ranks = tuple(tuple(map(_natural, _as_list(row))) for row in _as_list(rows))
    if any(len(set(rank)) != len(rank) for rank in ranks):
        raise _FieldError("placement has an expert twice on one rank")
    if len(ranks) != ep_size:
        raise _FieldError(f"placement lists {len(ranks)} ranks, ep_size is {ep_size}")
    experts = {expert for rank in ranks for expert in rank}
    if len(experts) != num_experts or max(experts, default=-1) != num_experts - 1:
        raise _FieldError(f"placement does not cover experts 0 to {num_experts - 1}")
    return ranks


def _parse_module(info: Mapping[str, Any]) -> ModuleInfo:
    return ModuleInfo(
        layout=_one_of(_field(info, "layout"), get_args(ExpertLayout)),
        source_layout=_text(_field(info, "source_layout")),
        gate_up=_one_of(_field(info, "gate_up"), get_args(GateUp)),
        lora_rank=_natural(_field(info, "lora_rank")),
        scaling={
            _one_of(projection, PROJECTIONS): tuple(map(_scaling, scale))
            if isinstance(scale, list)
            else _scaling(scale)
            for projection, scale in _object(info, "scaling").items()
        },
        absent_experts=tuple(map(_natural, _as_list(_field(info, "absent_experts")))),
        expert_lora_ranks={
            _one_of(projection, PROJECTIONS): {
                _expert(expert): _natural(lora_rank)
                for expert, lora_rank in _as_object(lora_ranks).items()
            }
            for projection, lora_ranks in _as_object(info.get("expert_lora_ranks", {})).items()
        },
    )


def _parse_file(info: Mapping[str, Any]) -> ShardFile:
    tensors = []
    for name, value in _object(info, "tensors").items():
        tensor = _as_object(value)
        shape = tuple(map(_natural, _as_list(_field(tensor, "shape"))))
        begin = _natural(_field(tensor, "offset"))
        end = begin + _natural(_field(tensor, "size"))
        dtype = _one_of(_field(tensor, "dtype"), tuple(ELEMENT_BITS))
        tensors.append(TensorEntry(name, dtype, shape, begin, end))
    return ShardFile(_parse_digest(info), tuple(tensors))


def _parse_digest(info: Mapping[str, Any]) -> FileDigest:
    digest = _text(_field(info, "blake3"))
    if len(digest) != _DIGEST_LENGTH or not set(digest) <= set("0123456789abcdef"):
        raise _FieldError(f"{_shown(digest)} is not a BLAKE3 digest")
    return FileDigest(_natural(_field(info, "size")), digest)


def _field(info: Mapping[str, Any], name: str) -> Any:
    if name not in info:
        raise _FieldError(f"damaged: the field {name!r} is missing")
    return info[name]


def _object(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    return _as_object(_field(info, name))


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _FieldError(f"damaged: {_shown(value)} is not an object")
    return value


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _FieldError(f"damaged: {_shown(value)} is not a list")
    return value


def _one_of(value: Any, choices: Sequence[Any]) -> Any:
    if isinstance(value, (dict, list)) or value not in choices:
        raise _FieldError(f"{_shown(value)} is not one of {', '.join(map(str, choices))}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _FieldError(f"{_shown(value)} is not a text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _FieldError(f"{_shown(value)} is not true or false")
    return value


def _scaling(value: Any) -> float:
    if type(value) not in (int, float) or not -_MAX_SCALING < value < _MAX_SCALING:
        raise _FieldError(f"{_shown(value)} is not a scaling")
    number: float = value
    return number


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _FieldError(f"{_shown(value)} is not an integer >= 0")
    if value > _MAX_NATURAL:
        raise _FieldError(f"an integer of {value.bit_length()} bits is not a size or a number")
    return value


def _expert(key: str) -> int:
    """The number of an expert; keys of a JSON object are texts."""
    if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_DIGITS):
        raise _FieldError(f"{_shown(key)} is not the number of an expert")
    return int(key)


def _shown(value: Any) -> str:
    """A value for a message; short and flat, whatever it is."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:80]
