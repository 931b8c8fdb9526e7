"""Target: a safetensors file. What we accept, the reference implementation accepts and reads alike."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator

import safetensors

from lorashard.dtypes import ELEMENT_BITS
from lorashard.header import LENGTH_BYTES, Header, header_length, parse_header
from tests.fuzz.mutators import end_of, mutate_header
from tests.fuzz.target import Target, check

_DESCRIPTOR = os.memfd_create("safetensors")


def _run(data: bytes) -> bool:
    length = header_length(data[:LENGTH_BYTES], len(data), "x")
    header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), "x")
    _compare(data, header)
    return True


def _compare(data: bytes, header: Header) -> None:
    try:
        read = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as err:
        check(holds=False, says=f"safetensors refuses it: {err}")
    check(read.keys() == {entry.name for entry in header.tensors}, "not the same tensors")
    for entry in header.tensors:
        theirs = read[entry.name]
        check(theirs["dtype"] == entry.dtype, "not the same dtype")
        check(tuple(theirs["shape"]) == entry.shape, "not the same shape")
        check(theirs["data"] == data[entry.begin : entry.end], "not the same bytes")
    os.ftruncate(_DESCRIPTOR, 0)
    os.pwrite(_DESCRIPTOR, data, 0)
    try:
        with safetensors.safe_open(f"/proc/self/fd/{_DESCRIPTOR}", "np") as file:
            check(set(file.keys()) == read.keys(), "safe_open finds other tensors")
            theirs_too = file.metadata() or {}
    except safetensors.SafetensorError as err:
        check(holds=False, says=f"safe_open refuses it: {err}")
    check(theirs_too == dict(header.metadata), "not the same metadata")


def _seeds() -> Iterator[bytes]:
    pair = {
        "m.experts.0.up_proj.lora_A": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
        "m.experts.0.up_proj.lora_B": {"dtype": "BF16", "shape": [8, 2], "data_offsets": [32, 64]},
    }
    kinds = {
        kind: {"dtype": kind, "shape": [2, 4], "data_offsets": [0, bits]}
        for kind, bits in ELEMENT_BITS.items()
    }
    for header in (
        {},
        {"__metadata__": {}},
        {"__metadata__": {"format": "pt", "é": '"\\'}, **pair},
        {"empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}},
        {"scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
        *({name: info} for name, info in kinds.items()),
    ):
        for spaces in (0, 3):
            text = json.dumps(header, ensure_ascii=False).encode() + b" " * spaces
            yield struct.pack("<Q", len(text)) + text + bytes(end_of(header))


TARGETS = (
    Target(
        "header",
        "a safetensors file, beside `safetensors.safe_open`: what we accept it accepts, and reads alike",
        _run,
        _seeds,
        mutate_header,
        max_bytes=4096,
    ),
)
