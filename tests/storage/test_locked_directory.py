"""A directory for one process at a time, under a name that anybody can guess."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorashard.errors import OutputExistsError, ShardError
from lorashard.storage.locked_directory import has_content, locked_directory, resumable_directory
from tests.tiny import contents

FOREIGN = {"thesis.txt": b"three years", "folder/more.txt": b"x"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    directory = tmp_path / "foreign"
    for name, content in FOREIGN.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.lorashard-pull"


def resumable(target: Path, content: bytes = b"version 1"):
    return resumable_directory(target, marker="marker", content=content)


@contextmanager
def interrupted(target: Path, content: bytes = b"version 1"):
    """A run that fails after the block."""
    with pytest.raises(KeyError), resumable(target, content) as work:  # noqa: PT012
        yield work
        raise KeyError


def test_a_second_one_is_locked_out_until_the_first_ends(target: Path) -> None:
    path = target.parent / ".work"
    with locked_directory(path, target):
        with (
            pytest.raises(OutputExistsError, match="another lorashard is writing it") as raised,
            locked_directory(path, target),
        ):
            pass
        assert str(path) in str(raised.value)
    with locked_directory(path, target) as locked:
        assert locked.is_in_place()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "pipe"])
def test_what_has_the_name_and_is_no_directory_is_refused_and_left_alone(
    target: Path, foreign: Path, kind: str
) -> None:
    work = work_of(target)
    if "link" in kind:
        work.symlink_to(foreign if kind == "link" else "nowhere")
    elif kind == "file":
        work.write_bytes(b"mine")
    else:
        os.mkfifo(work)
    before = work.lstat()
    with pytest.raises(ShardError, match=r"\.out\.lorashard-pull is a link or a file"):
        resumable(target).__enter__()
    assert os.path.samestat(work.lstat(), before)
    assert contents(foreign) == FOREIGN


def test_a_directory_that_was_removed_before_the_lock_is_made_again(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner finishes and removes it between this one's open and its lock."""
    flock, removed = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(work_of(target))
            shutil.rmtree(work_of(target))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with resumable(target) as work:
        assert removed == [work]
        assert contents(work) == {"marker": b"version 1"}


def test_a_directory_that_was_removed_before_it_is_opened_is_made_again(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_open, removed = os.open, []

    def remove_first(path: object, flags: int, *more: int) -> int:
        if path == work_of(target) and not removed:
            removed.append(path)
            work_of(target).rmdir()
        return system_open(path, flags, *more)

    monkeypatch.setattr(os, "open", remove_first)
    with resumable(target) as work:
        assert removed == [work]
        assert work.is_dir()


def test_another_directory_of_the_same_name_is_not_removed(target: Path) -> None:
    path = target.parent / ".work"
    with locked_directory(path, target) as locked:
        path.rename(target)
        path.mkdir()
        (path / "of the next").write_bytes(b"x")
        locked.remove()
        assert contents(path) == {"of the next": b"x"}
        assert not locked.is_in_place()


def test_clearing_does_not_follow_links(target: Path, foreign: Path) -> None:
    path = target.parent / ".work"
    path.mkdir()
    (path / "link").symlink_to(foreign)
    (path / "folder").mkdir()
    (path / "folder" / "link").symlink_to(foreign)
    with locked_directory(path, target) as locked:
        locked.clear()
    assert os.listdir(path) == []
    assert contents(foreign) == FOREIGN


def test_work_that_failed_is_continued(target: Path) -> None:
    with interrupted(target) as work:
        (work / "fetched").write_bytes(b"half")
    with resumable(target) as work:
        assert contents(work) == {"marker": b"version 1", "fetched": b"half"}
    assert os.listdir(target.parent) == []


def test_work_for_another_version_is_begun_again(target: Path) -> None:
    with interrupted(target) as work:
        (work / "fetched").write_bytes(b"half")
        (work / "folder").mkdir()
    with resumable(target, b"version 2") as work:
        assert contents(work) == {"marker": b"version 2"}
        assert os.listdir(work) == ["marker"]


def test_without_a_marker_nothing_in_it_is_trusted(target: Path) -> None:
    work_of(target).mkdir()
    (work_of(target) / "fetched").write_bytes(b"whatever")
    with resumable(target) as work:
        assert contents(work) == {"marker": b"version 1"}


def test_the_marker_is_on_disk_before_anything_else_is_done(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, set()

    def remembered(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", remembered)
    with resumable(target) as work:
        assert (work / "marker").stat().st_ino in synced


def test_an_os_error_in_the_block_is_a_shard_error_that_says_what_to_do(target: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(ShardError, match=r"cannot be written \(Input/output error\)") as raised,
        resumable(target) as work,
    ):
        (work / "fetched").write_bytes(b"half")
        raise OSError(5, "Input/output error")
    assert "-o" in str(raised.value)
    assert (work_of(target) / "fetched").read_bytes() == b"half"


@pytest.mark.parametrize("reached", ["file/out", "file/a/out", "x" * 250])
def test_a_place_that_is_impossible_is_a_shard_error(tmp_path: Path, reached: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match="cannot be written") as raised:
        resumable(tmp_path / reached).__enter__()
    assert raised.value.exit_code == 5
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_of_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"version 1")
    assert not has_content(tmp_path / "pipe", b"version 1")
    assert not has_content(tmp_path / "file", b"version")
    assert has_content(tmp_path / "file", b"version 1")
