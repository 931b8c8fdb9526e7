"""A directory held open, while its path becomes something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard.errors import AdapterError, HeaderError
from lorashard.storage.held_directory import HeldDirectory


def directory(path: Path, content: bytes) -> Path:
    path.mkdir()
    (path / "file").write_bytes(content)
    return path


def test_files_are_those_of_the_directory_that_was_opened(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", b"old")
    held = HeldDirectory(path)
    assert not held.was_replaced()
    path.rename(tmp_path / "b")
    assert held.was_replaced()
    directory(path, b"new")
    assert held.was_replaced()
    assert held.read("file", 3) == b"old"
    file = held.file("file")
    assert file.read(0, 3) == b"old"
    file.close()
    held.close()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    held = HeldDirectory(tmp_path)
    with pytest.raises(HeaderError, match=r"pipe: .*not a file"):
        held.file("pipe")
    held.close()


def test_a_file_larger_than_its_bound_is_refused(tmp_path: Path) -> None:
    held = HeldDirectory(directory(tmp_path / "a", b"old"))
    with pytest.raises(AdapterError, match="larger than 2 bytes"):
        held.read("file", 2)
    held.close()
