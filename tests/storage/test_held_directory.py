"""A directory held open, while its path becomes something else."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
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


def test_a_file_is_kept_until_it_is_written_to_moved_or_replaced(tmp_path: Path) -> None:
    for number, change in enumerate(
        (
            lambda path: path.write_bytes(b"new"),
            lambda path: path.rename(path.with_name("elsewhere")),
            lambda path: (path.parent / "new").rename(path),
        )
    ):
        path = directory(tmp_path / str(number), b"old")
        (path / "new").write_bytes(b"new")
        with closing(HeldDirectory(path)) as held, closing(held.file("file")) as file:
            assert held.has_kept(file)
            change(path / "file")
            assert not held.has_kept(file)


def test_a_file_that_is_deleted_or_goes_with_its_directory_is_kept(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", b"old")
    with closing(HeldDirectory(path)) as held, closing(held.file("file")) as file:
        path.rename(tmp_path / "b")
        assert held.has_kept(file)
        shutil.rmtree(tmp_path / "b")
        assert held.has_kept(file)
        assert file.read(0, 3) == b"old"


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
