"""The start of a safetensors file, here or elsewhere -> its header. No tensor data is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from lorashard.header import LENGTH_BYTES, Header, header_length, parse_header
from lorashard.storage.local import open_regular


class SizedSource(Protocol):
    """What reads the bytes of a safetensors file of known size."""

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""

    @property
    def name(self) -> str:
        """For messages."""

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end)."""


def read_header(file: Path | SizedSource) -> tuple[bytes, Header]:
    """The raw bytes up to the data, and the validated header.

    Raises HeaderError for a damaged file, OSError or AdapterError for one that cannot be read.
    """
    if not isinstance(file, Path):
        raw = read_raw_header(file)
        return raw, parse_raw_header(raw, file)
    with os.fdopen(open_regular(file), "rb") as opened:
        size, name = os.fstat(opened.fileno()).st_size, str(file)
        prefix = opened.read(LENGTH_BYTES)
        text = opened.read(header_length(prefix, size, name))
    return prefix + text, parse_header(text, size, name)


def read_raw_header(file: SizedSource) -> bytes:
    """The bytes up to the data, of which only the length is checked. Raises as `read_header` does."""
    size, name = file.size_bytes, file.name
    prefix = file.read(0, min(LENGTH_BYTES, size))
    return prefix + file.read(LENGTH_BYTES, LENGTH_BYTES + header_length(prefix, size, name))


def parse_raw_header(raw: bytes, file: SizedSource) -> Header:
    """The validated header of a file that begins with these bytes. Raises HeaderError."""
    return parse_header(raw[LENGTH_BYTES:], file.size_bytes, file.name)
