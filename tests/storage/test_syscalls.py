"""The system calls themselves, on real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorashard.storage.syscalls import exchange, rename_to_free, reserve, start_writeback
from tests.tiny import contents, mounted_tmpfs


def test_a_reserved_file_has_its_size_its_blocks_and_zeros(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        reserve(file.fileno(), 1_000_000)
        status = os.fstat(file.fileno())
        assert status.st_size == 1_000_000
        assert status.st_blocks * 512 >= 1_000_000
        assert file.read() == bytes(1_000_000)


def test_an_empty_file_is_reserved(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        reserve(file.fileno(), 0)
        assert os.fstat(file.fileno()).st_size == 0


def test_a_disk_that_is_too_small_is_noticed_before_a_byte_is_written(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=64k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        with (tmp_path / "disk" / "file").open("w+b") as file:
            with pytest.raises(OSError, match="No space left") as raised:
                reserve(file.fileno(), 10**6)
            assert raised.value.errno == errno.ENOSPC


def test_writeback_changes_nothing_and_bears_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("r+b") as file:
        start_writeback(file.fileno(), 0, 7)
    start_writeback(-1, 0, 7)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_exchanged_directories_have_each_others_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        directory.mkdir()
        (directory / directory.name).write_bytes(b"x")
    if not exchange(one, other):
        pytest.skip("this file system cannot")
    assert (contents(one), contents(other)) == ({"other": b"x"}, {"one": b"x"})


def test_an_exchange_that_is_not_possible_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert not exchange(tmp_path / "one", tmp_path / "none")
    assert os.listdir(tmp_path) == ["one"]


def test_a_rename_to_a_free_name_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not rename_to_free(tmp_path / "one", tmp_path / "new"):
        pytest.skip("this file system cannot")
    assert sorted(os.listdir(tmp_path)) == ["new", "two"]
    with pytest.raises(FileExistsError):
        rename_to_free(tmp_path / "new", tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["new", "two"]
