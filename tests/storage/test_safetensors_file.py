"""The header of a safetensors file, and not a byte of its data."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file

from lorashard.errors import HeaderError
from lorashard.storage.remote import RemoteFile, over_local_files
from lorashard.storage.safetensors_file import read_header


class RangeLog(LocalFileSystem):
    """A real driver that remembers which bytes were fetched."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int]] = []

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.ranges.append((start, end))
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"b": torch.ones(3, 5, dtype=torch.bfloat16), "a": torch.zeros(7)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    return tmp_path / "file.safetensors"


def remote(path: Path) -> RemoteFile:
    file = over_local_files(path.parent).file(path.name)
    assert file is not None
    return file


def test_the_raw_header_ends_where_the_data_begins(path: Path) -> None:
    raw, header = read_header(path)
    assert path.read_bytes()[: header.data_begin] == raw
    assert [(e.name, e.dtype, e.shape) for e in header.tensors] == [
        ("a", "F32", (7,)),
        ("b", "BF16", (3, 5)),
    ]
    assert header.file_size == path.stat().st_size


def test_a_remote_file_has_the_same_header(path: Path) -> None:
    assert read_header(remote(path)) == read_header(path)


def test_of_a_remote_file_no_data_is_fetched(path: Path) -> None:
    fs, size = RangeLog(), path.stat().st_size
    raw, _ = read_header(RemoteFile(path.name, str(path), size, "", fs))
    assert fs.ranges == [(0, 8), (8, len(raw))]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("size_bytes", [0, 7, 8, 50, -1])
def test_a_truncated_file_is_refused(path: Path, where: str, size_bytes: int) -> None:
    content = path.read_bytes()[:size_bytes]
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=path.name):
        read_header(path if where == "here" else remote(path))


def test_an_absurd_length_is_refused_before_so_much_is_read(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(HeaderError, match="is over 100000000"):
        read_header(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")
