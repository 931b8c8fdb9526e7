"""The safetensors header: bytes <-> values. Nothing here opens a file.

Format: the header's length in 8 bytes, little-endian; that many bytes of JSON; the data. A header is
trusted only after every check of the reference implementation (safetensors `Metadata::validate`),
because its offsets decide what is read and where it goes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import attrgetter, mul
from typing import NamedTuple

from lorashard.dtypes import ELEMENT_BITS, FILE_ORDER
from lorashard.errors import HeaderError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_NAME_LENGTH = 4096  # characters; far above any real name
# What `git clone` without git-lfs leaves in the place of a file. As a length it is beyond any file.
GIT_LFS_BEGIN = b"version https://git-lfs"
GIT_LFS_POINTER = "it is a Git LFS pointer; `git lfs pull` or `hf download` fetches the file itself"
_MAX_NUMBER = 2**63 - 1  # of a shape, an offset, or a tensor's bytes: what a file can have
_SMALL_BYTES = 2**20  # of a header that is parsed without a look at its form
_TEXT = re.compile(rb'"[^"]*"?')  # without escapes; one that does not end goes to the end
_MAX_COMMAS = 16  # of a tensor of 13 dimensions
_SPARE_COMMAS = 2**16  # for metadata, and for some tensors of more dimensions
_MAX_DIMENSIONS = 64  # PyTorch's own limit
_FIELDS = (b'"dtype"', b'"shape"', b'"data_offsets"')  # of a tensor


class TensorEntry(NamedTuple):
    """One tensor of one file. `begin` and `end` are bytes from the start of the file.

    There can be 100,000 of them, and a tuple is made in a third of a frozen dataclass's time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header. `tensors` are in file order and tile [data_begin, file_size)."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_begin: int
    file_size: int


def header_length(prefix: bytes, file_size: int, path: str) -> int:
    """How many bytes of JSON follow the 8-byte `prefix`. Raises HeaderError if that cannot be."""
    if len(prefix) < LENGTH_BYTES:
        raise HeaderError(path, f"{file_size} bytes are too few for a header")
    if prefix.startswith(GIT_LFS_BEGIN[:LENGTH_BYTES]):
        raise HeaderError(path, GIT_LFS_POINTER)
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(path, f"header length {length} is over {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_size:
        raise HeaderError(path, f"header length {length} is past the end ({file_size} bytes)")
    return int(length)


def parse_header(raw: bytes, file_size: int, path: str) -> Header:
    """Parse and validate the JSON part `raw` of a header.

    Raises HeaderError unless the tensors tile the data area without hole or overlap, each size
    fits its dtype and shape, and the file ends with the last tensor.
    """
    parsed = _decode(raw, path)
    _refuse_minus_zero(raw, path)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(path, "__metadata__ is not a map of strings")
    _refuse_duplicate_keys(raw, len(parsed), metadata, path)
    _refuse_lone_surrogates(raw, (*parsed, *metadata, *metadata.values()), path)

    data_begin = LENGTH_BYTES + len(raw)
    kinds: _Kinds = {}
    entries = [_parse_entry(name, info, data_begin, kinds, path) for name, info in parsed.items()]
    entries.sort(key=attrgetter("begin", "end"))
    _check_tiling(entries, data_begin, file_size, path)
    return Header(tuple(entries), metadata, data_begin, file_size)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Lay out (name, dtype, shape) triples as the reference writer does.

    Returns the bytes from the start of the file to the data, and each tensor's entry. They are
    ordered by dtype, wider ones first so that every tensor is aligned to its element size, then by
    name.
    """
    ordered = sorted(tensors, key=lambda tensor: (FILE_ORDER[tensor[1]], tensor[0]))
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, dtype, shape in ordered:
        end = offset + prod(shape) * ELEMENT_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    begin = len(raw)
    entries = []
    for name, dtype, shape in ordered:
        end = begin + prod(shape) * ELEMENT_BITS[dtype] // 8
        entries.append(TensorEntry(name, dtype, shape, begin, end))
        begin = end
    return raw, tuple(entries)


def _decode(raw: bytes, path: str) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise HeaderError(path, "the header does not start with '{'")
    if len(raw) > _SMALL_BYTES and not _may_be_a_table(raw):
        raise HeaderError(path, "the header is not a table of tensors")
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise HeaderError(path, f"the header is not JSON ({err})") from err
    if not isinstance(parsed, dict):
        raise HeaderError(path, "the header is not a JSON object")
    return parsed


def _may_be_a_table(raw: bytes) -> bool:
    """Whether it has no more lists, objects and values than a table of its tensors and metadata.

    Before it is parsed: `[],` are 3 bytes, which become more than 60 of memory. Of the values in a
    list or an object, each but the first follows a comma.
    """
    num_tensors = raw.count(b'"data_offsets"')
    num_lists, num_objects, num_commas = raw.count(b"["), raw.count(b"{"), raw.count(b",")
    few_commas = num_commas <= _MAX_COMMAS * num_tensors + _SPARE_COMMAS
    if num_lists <= 2 * num_tensors and num_objects <= num_tensors + 2 and few_commas:
        return True
    num_texts = 0
    # A name or the metadata may have brackets and commas.
    for match in _TEXT.finditer(raw.replace(b"\\\\", b"").replace(b'\\"', b"")):
        num_texts += 1
        num_lists -= match[0].count(b"[")
        num_objects -= match[0].count(b"{")
        num_commas -= match[0].count(b",")
    # A tensor has a name, three fields, a dtype and two lists.
    few_commas = num_commas <= _MAX_COMMAS * num_objects + _SPARE_COMMAS
    return num_lists <= 2 * num_objects and num_objects <= num_texts // 5 + 2 and few_commas


def _refuse_minus_zero(raw: bytes, path: str) -> None:
    # To json.loads it is 0, to the reference implementation no number that a file can have.
    if b"-0" not in raw:
        return

    def integer(text: str) -> int:
        if text == "-0":
            raise HeaderError(path, "shape and data_offsets must be integers >= 0, not -0")
        return int(text)

    json.loads(raw, parse_int=integer)


def _refuse_duplicate_keys(
    raw: bytes, num_tensors: int, metadata: Mapping[str, str], path: str
) -> None:
    # json.loads keeps the last of two equal keys; another reader may keep the first. If each field
    # is spelled once for each tensor and nothing is escaped, no key is repeated. Only otherwise is
    # the header parsed again with a look at every key, which takes ten times as long.
    usual = set(metadata) <= {"format"} and raw.count(b'"format"') <= 1
    num_metadata = raw.count(b'"__metadata__"')
    # A tensor's name, its fields and its dtype have ten quotes; a key with another value adds two.
    num_quotes = 10 * num_tensors + 2 * num_metadata + 4 * len(metadata)
    once = usual and num_metadata <= 1 and raw.count(b'"') == num_quotes
    if once and b"\\" not in raw and all(raw.count(field) == num_tensors for field in _FIELDS):
        return

    def refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise HeaderError(path, "the header names a tensor or a field twice")
        return dict(pairs)

    try:
        json.loads(raw, object_pairs_hook=refuse_twice)
    except RecursionError as err:  # the hook needs more of the stack than the first reading
        raise HeaderError(path, "the header is nested too deeply") from err


def _refuse_lone_surrogates(raw: bytes, texts: Iterable[str], path: str) -> None:
    if b"\\u" not in raw:
        return
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as err:
        raise HeaderError(path, "a name or its metadata is not valid Unicode") from err


# (dtype, shape) -> (shape, bytes). 100,000 tensors are of a few kinds; each kind is checked once.
_Kinds = dict[tuple[object, ...], tuple[tuple[int, ...], int]]


def _parse_entry(name: str, info: object, data_begin: int, kinds: _Kinds, path: str) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH:
        raise HeaderError(path, f"a name of {len(name)} characters ({name[:40]}...)")
    try:
        dtype, shape_list, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]  # type: ignore[index]
        if type(dtype) is not str:
            raise HeaderError(path, f"{name}: dtype {dtype!r} is not known")
        # The types are part of the key, because True == 1 == 1.0.
        key = (dtype, type(shape_list), *shape_list, *map(type, shape_list))
        kind = kinds.get(key)
    except (TypeError, KeyError, ValueError) as err:
        raise HeaderError(path, f"{name}: dtype, shape or data_offsets is missing") from err
    if len(info) != len(_FIELDS):  # type: ignore[arg-type]
        # What is in it is not checked, and the reference implementation does not take all of JSON.
        raise HeaderError(path, f"{name}: a field beside dtype, shape and data_offsets")
    if kind is None:
        kind = kinds[key] = _check_kind(name, dtype, shape_list, path)
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise HeaderError(path, f"{name}: shape and data_offsets must be integers >= 0")
    if begin > _MAX_NUMBER or not -1 < end <= _MAX_NUMBER:
        raise HeaderError(path, f"{name}: data_offsets are not of this file")
    shape, size_bytes = kind
    if end - begin != size_bytes:
        raise HeaderError(path, f"{name}: {dtype} {list(shape)} is not {end - begin} bytes")
    return TensorEntry(name, dtype, shape, data_begin + begin, data_begin + end)


def _check_kind(name: str, dtype: str, shape: object, path: str) -> tuple[tuple[int, ...], int]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise HeaderError(path, f"{name}: shape and data_offsets must be integers >= 0")
    # The reference implementation multiplies in this order, and refuses what it cannot hold on the
    # way, even if a zero follows.
    if (
        len(shape) > _MAX_DIMENSIONS
        or any(n > _MAX_NUMBER for n in shape)
        or max(accumulate(shape, mul, initial=1)) > _MAX_NUMBER
    ):
        raise HeaderError(path, f"{name}: no tensor has this shape")
    element_bits = ELEMENT_BITS.get(dtype)
    if element_bits is None:
        raise HeaderError(path, f"{name}: dtype {dtype!r} is not known")
    size_bytes, rest = divmod(prod(shape) * element_bits, 8)
    if rest:
        raise HeaderError(path, f"{name}: {dtype} {shape} does not end with a whole byte")
    return tuple(shape), size_bytes


def _check_tiling(entries: list[TensorEntry], data_begin: int, file_size: int, path: str) -> None:
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps its neighbour" if entry.begin < position else "leaves a hole"
            raise HeaderError(path, f"{entry.name} {kind} at byte {position}")
        position = entry.end
    if position != file_size:
        raise HeaderError(path, f"tensors end at byte {position}, the file at {file_size}")
