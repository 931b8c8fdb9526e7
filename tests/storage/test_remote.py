"""Folders elsewhere, through real drivers of fsspec's: memory://, and local files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lorashard.errors import AdapterError
from lorashard.storage.remote import (
    RemoteFolder,
    is_remote,
    local_copy,
    locate,
    over_local_files,
)

FILES = {"config.json": b"{}", "weights": bytes(range(256)) * 4}


@pytest.fixture
def folder() -> Iterator[RemoteFolder]:
    fs = MemoryFileSystem()
    for name, content in FILES.items():
        fs.pipe_file(f"/adapters/mine/{name}", content)
    place = locate("memory://adapters/mine/")
    assert isinstance(place, RemoteFolder)
    yield place
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def weights(folder: RemoteFolder):
    file = folder.file("weights")
    assert file is not None
    return file


def test_a_folder_has_files_of_a_known_size(folder: RemoteFolder) -> None:
    assert weights(folder).size_bytes == 1024
    assert weights(folder).name == "memory://adapters/mine/weights"
    assert folder.file("none") is None
    assert (folder.has("config.json"), folder.has("none")) == (True, False)


@pytest.mark.parametrize(("begin", "end"), [(0, 1024), (5, 6), (1000, 1024), (7, 7), (9, 3)])
def test_a_range_is_read_exactly(folder: RemoteFolder, begin: int, end: int) -> None:
    assert weights(folder).read(begin, end) == FILES["weights"][begin:end]


def test_a_range_that_is_not_there_is_an_error_that_says_what_to_do(folder: RemoteFolder) -> None:
    file = weights(folder)
    folder.fs.rm_file(file.path)
    with pytest.raises(AdapterError, match=r"mine/weights: cannot be read") as raised:
        file.read(0, 10)
    assert raised.value.hint == "Is the server reachable? Try again."
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_an_opened_file_is_read_in_windows(folder: RemoteFolder) -> None:
    buffer = bytearray(1000)
    with weights(folder).opened(24, window_bytes=100, ahead=2) as source:
        source.read_into(memoryview(buffer), 24)
    assert bytes(buffer) == FILES["weights"][24:]


@pytest.mark.parametrize("now", [b"shorter", None])
def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path, now: bytes | None) -> None:
    (tmp_path / "weights").write_bytes(FILES["weights"])
    file = over_local_files(tmp_path).file("weights")
    assert file is not None
    with (  # noqa: PT012
        pytest.raises(AdapterError, match="it changed while being read"),
        file.opened() as source,
    ):
        source.read_into(memoryview(bytearray(10)), 0)
        (tmp_path / "weights").unlink()
        if now is not None:
            (tmp_path / "weights").write_bytes(now)


def test_folders_are_listed_without_files(folder: RemoteFolder) -> None:
    folder.fs.pipe_file("/adapters/other/config.json", b"{}")
    parent = locate("memory://adapters")
    assert isinstance(parent, RemoteFolder)
    assert parent.folders() == ["mine", "other"]
    child = parent.child("mine")
    assert (child.name, str(child)) == ("mine", "memory://adapters/mine")
    with pytest.raises(AdapterError, match="no such folder"):
        parent.child("none").folders()


def test_a_copy_has_the_named_files_that_exist_and_goes_away(folder: RemoteFolder) -> None:
    with local_copy(folder, ("weights", "none")) as copy:
        assert os.listdir(copy) == ["weights"]
        assert (copy / "weights").read_bytes() == FILES["weights"]
    assert not copy.exists()


def test_a_local_directory_is_its_own_copy(tmp_path: Path) -> None:
    with local_copy(tmp_path, ("weights",)) as copy:
        assert copy is tmp_path


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("s3://bucket/a", True),
        ("owner/name", True),
        ("here/name", False),
        ("here", False),
        ("./owner/name", False),
        ("/owner/name", False),
    ],
)
def test_a_name_is_elsewhere_only_if_nothing_here_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, answer: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_remote(text) is answer


def test_a_path_object_is_always_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(Path("owner/name")) == Path("owner/name")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(AdapterError, match="s4://bucket/a") as raised:
        locate("s4://bucket/a")
    assert raised.value.hint == "Is the part before :// right?"


@pytest.mark.parametrize("empty", ["", " "])
def test_no_name_is_not_the_current_folder(empty: str) -> None:
    with pytest.raises(AdapterError, match="is not a place"):
        locate(empty)
