"""Bytes and sizes through a real driver of fsspec's whose connection breaks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from lorashard.errors import AdapterError
from lorashard.storage import drivers
from lorashard.storage.drivers import is_hub, is_object_store, read_range, size_and_version

CONTENT = bytes(range(256))


class Unreliable(LocalFileSystem):
    """Each call goes through the next of `faults` first, until none is left."""

    cachable = False

    def __init__(self, *faults: Callable[[bytes], bytes], protocol: str = "file") -> None:
        super().__init__()
        self.faults, self.calls, self.protocol = list(faults), 0, protocol

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        return self._faulty(lambda: super(Unreliable, self).cat_file(path, start, end))

    def info(self, path: str, **options: Any) -> Any:
        return self._faulty(lambda: super(Unreliable, self).info(path))

    def _faulty(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        answer = call()
        return self.faults.pop(0)(answer) if self.faults else answer


def broken(_: Any) -> Any:
    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def forbidden(_: Any) -> Any:
    raise PermissionError(errno.EACCES, "Forbidden")


def short(data: bytes) -> bytes:
    return data[:-1]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(drivers, "_FIRST_WAIT_S", 0)
    (tmp_path / "file").write_bytes(CONTENT)
    return str(tmp_path / "file")


def read(fs: Any, path: str) -> bytes:
    return read_range(fs, path, 10, 20, len(CONTENT))


@pytest.mark.parametrize("faults", [(), (broken,), (short, broken), (short, short)])
def test_a_read_is_tried_three_times(path: str, faults: Any) -> None:
    fs = Unreliable(*faults)
    assert read(fs, path) == CONTENT[10:20]
    assert fs.calls == 1 + len(faults)


def test_what_breaks_three_times_is_given_up(path: str) -> None:
    fs = Unreliable(broken, broken, short, broken)
    with pytest.raises(EOFError, match="9 bytes arrived instead of 10"):
        read(fs, path)
    assert fs.calls == 3


@pytest.mark.parametrize("protocol", ["s3", "gs", "abfs"])
def test_a_driver_that_retries_by_itself_is_called_once(path: str, protocol: str) -> None:
    fs = Unreliable(broken, protocol=protocol)
    assert is_object_store(fs)
    with pytest.raises(ConnectionResetError):
        read(fs, path)
    with pytest.raises(AdapterError):
        size_and_version(Unreliable(broken, protocol=protocol), path, "shown")
    assert fs.calls == 1


def test_missing_files_and_rights_are_not_tried_again(path: str) -> None:
    fs = Unreliable(forbidden, forbidden)
    with pytest.raises(PermissionError):
        read(fs, path)
    with pytest.raises(FileNotFoundError):
        read(fs, path + "-none")
    assert fs.calls == 2


def test_a_size_is_asked_for_three_times_and_then_the_error_says_what_to_do(path: str) -> None:
    assert size_and_version(Unreliable(broken, broken), path, "shown")[0] == 256
    with pytest.raises(AdapterError, match="shown: ConnectionResetError") as raised:
        size_and_version(Unreliable(broken, broken, broken), path, "shown")
    assert isinstance(raised.value.__cause__, ConnectionResetError)


@pytest.mark.parametrize("missing", ["none", "file/none", "."])
def test_only_a_file_has_a_size(path: str, missing: str) -> None:
    place = os.path.normpath(os.path.join(os.path.dirname(path), missing))  # noqa: PTH118, PTH120
    with pytest.raises(FileNotFoundError, match="shown"):
        size_and_version(Unreliable(), place, "shown")


def test_the_version_changes_with_the_content(path: str) -> None:
    before = size_and_version(Unreliable(), path, "shown")
    assert size_and_version(Unreliable(), path, "shown", refresh=True) == before
    os.utime(path, ns=(0, 0))
    after = size_and_version(Unreliable(), path, "shown", refresh=True)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_hubs_driver_is_known_by_its_protocol() -> None:
    from huggingface_hub import HfFileSystem

    assert is_hub(HfFileSystem(token=False))
    assert not is_hub(LocalFileSystem())
    assert not is_object_store(HfFileSystem(token=False))
