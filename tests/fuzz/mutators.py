"""Changes to JSON documents and safetensors headers that keep their form, so that readers go on.

A mutator of bytes alone is stopped by the first check. These change a value here and there, move
and rename parts, and repair lengths and offsets most of the time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

_NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 255, 256, 1000, 65_535, 65_536, 10**6, 10**9,
    2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -1, -2, -(2**63),
    0.0, -0.0, 0.5, 1.0, 2.0, 1e-300, 1e300, 1e308, float("inf"), float("nan"),
)  # fmt: skip
_TEXTS = (
    "", ".", "..", "/", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "é", "９", "0", "1", "-1", "1e9",
    "experts", "mlp.experts", "lora_A", "lora_B.weight", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "base_layer", "F32", "BF16", "F8_E4M3", "F4", "__metadata__", "data_offsets",
    "../../x", "a" * 5000, "(a+)+", "[", "(?=x)", ".*", "\\", "layers.1", "ranks", "expert_map", "hf://a/b",
)  # fmt: skip
_SMALL = 64  # bytes of data that a header is repaired with, at most times this

Path = tuple[Any, ...]


def mutate_json(document: Any, chance: Random, extra: tuple[Any, ...] = ()) -> Any:
    """A changed copy. extra: values that mean something in this kind of document."""
    document = _copy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        document = _change(document, chance, extra)
    return document


def json_mutator(*extra: Any) -> Callable[[bytes, int, Random], bytes | None]:
    """A mutator of JSON texts; what is not JSON, and some of the rest, is left to the fuzzer."""

    def mutate(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if chance.random() < 0.1:
            return None
        try:
            text = json.dumps(mutate_json(document, chance, extra)).encode()
        except (ValueError, RecursionError):
            return None
        text = _twice(text, chance) if chance.random() < 0.02 else text
        return text if len(text) <= max_bytes else None

    return mutate


def mutate_header(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    """A safetensors file with another header, whose length and data mostly fit again."""
    try:
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (ValueError, struct.error, RecursionError):
        return None
    if chance.random() < 0.1 or not isinstance(header, dict):
        return None
    header = mutate_json(header, chance)
    if isinstance(header, dict) and chance.random() < 0.7:
        _tile(header)
    try:
        text = json.dumps(header, ensure_ascii=chance.random() < 0.5).encode()
    except (ValueError, RecursionError):  # a lone surrogate has no bytes
        return None
    text = _twice(text, chance) if chance.random() < 0.03 else text
    text += b" " * chance.choice((0, 0, -len(text) % 8))
    length = len(text) if chance.random() < 0.97 else chance.choice((0, len(text) - 1, 2**63))
    size = end_of(header) if chance.random() < 0.95 else chance.randrange(2 * _SMALL)
    made = struct.pack("<Q", max(0, length)) + text + bytes(min(size, 256 * _SMALL))
    return made if len(made) <= max_bytes else None


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _change(document: Any, chance: Random, extra: tuple[Any, ...]) -> Any:
    path = _place(document, chance)
    if not path:
        return _value(document, chance, extra) if chance.random() < 0.1 else document
    parent, key = _at(document, path[:-1]), path[-1]
    what = chance.randrange(10)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), _copy(parent[key]))
    elif what == 2 and isinstance(parent, list):
        other = chance.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif what in (1, 2):
        name = chance.choice((*(k for k in parent), *_TEXTS))
        parent[_text(name, chance) if chance.random() < 0.5 else name] = parent.pop(key)
    elif what == 3:
        parent[key] = _copy(_at(document, _place(document, chance)))
    else:
        parent[key] = _copy(_value(parent[key], chance, extra))
    return document


def _value(old: Any, chance: Random, extra: tuple[Any, ...]) -> Any:
    if isinstance(old, bool) or old is None or chance.random() < 0.2:
        kinds = (None, True, False, [], {}, chance.choice(_NUMBERS), chance.choice(_TEXTS))
        return chance.choice((*kinds, *extra))
    if isinstance(old, (int, float)):
        near: tuple[Any, ...] = (chance.choice(_NUMBERS),)
        if isinstance(old, int) and abs(old) < 2**70:
            near = (*near, old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old))
        return chance.choice(near)
    if isinstance(old, str):
        return chance.choice(extra) if extra and chance.random() < 0.1 else _text(old, chance)
    if isinstance(old, list):
        return old[:50] * 2 if chance.random() < 0.5 else old[: chance.randrange(len(old) + 1)]
    return [old] if chance.random() < 0.5 else dict(list(old.items())[::-1])


def _text(old: str, chance: Random) -> str:
    at = chance.randrange(len(old) + 1)
    word = chance.choice(_TEXTS)
    return chance.choice(
        (
            word,
            old[:at] + word[:50] + old[at:],
            old[:at] + chr(chance.randrange(32, 127)) + old[at + 1 :],
            old[:at] + old[at + 1 :],
            old.replace("0", str(chance.randrange(12))),
            old.swapcase(),
        )
    )


def _place(document: Any, chance: Random) -> Path:
    """Some part of the document: down from the top, and now and then not to the end."""
    path: list[Any] = []
    while isinstance(document, (dict, list)) and document and chance.random() > 0.08:
        key = chance.choice(list(document) if isinstance(document, dict) else range(len(document)))
        path.append(key)
        document = document[key]
    return tuple(path)


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _twice(text: bytes, chance: Random) -> bytes:
    """One pair of some object twice, which no dict can have."""
    commas = [i for i, byte in enumerate(text) if byte == ord(",")]
    if len(commas) < 2:
        return text
    first = chance.randrange(len(commas) - 1)
    begin, end = commas[first], commas[chance.randrange(first + 1, len(commas))]
    return text[:end] + text[begin:end] + text[end:]


def _tile(header: dict[str, Any]) -> None:
    """Give the tensors offsets that fit their dtypes and shapes, as far as these make sense."""
    sizes = {"F64": 64, "I64": 64, "F32": 32, "F16": 16, "BF16": 16, "F4": 4, "F6_E2M3": 6}
    offset = 0
    for name, info in header.items():
        if name == "__metadata__" or not isinstance(info, dict):
            continue
        shape, dtype = info.get("shape"), info.get("dtype")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            continue
        bits = sizes.get(dtype, 8) if isinstance(dtype, str) else 8
        size = prod(shape) * bits // 8
        info["data_offsets"] = [offset, offset + size]
        offset += size


def end_of(header: Any) -> int:
    """Where a header's last tensor ends, in bytes of data."""
    ends = [0]
    for info in header.values() if isinstance(header, dict) else ():
        offsets = info.get("data_offsets") if isinstance(info, dict) else None
        ends += [n for n in offsets if type(n) is int] if isinstance(offsets, list) else []
    return max(ends)
