"""A target appears whole or not at all, and what is not ours is never touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorashard.errors import OutputExistsError, ShardError
from lorashard.storage.staging import clear_leftovers, staged_directory
from tests.tiny import REPO, contents, mounted_tmpfs, run_cli, save_adapter

FOREIGN = {"thesis.txt": b"three years"}


def ours(_path: Path, names: frozenset[str]) -> bool:
    return {"last"} <= names <= {"data", "last"}


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    with staged_directory(target, last="last", force=force, replaceable=ours) as staging:
        yield staging


def write(target: Path, content: bytes = b"new", *, force: bool = False) -> None:
    with staged(target, force=force) as staging:
        fill(staging, content)


def fill(staging: Path, content: bytes) -> None:
    (staging / "data").write_bytes(content)
    (staging / "last").write_bytes(b"")


def make(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_target_is_absent_until_the_block_ends(target: Path) -> None:
    with staged(target) as staging:
        (staging / "data").write_bytes(b"new")
        assert not target.exists()
    assert contents(target) == {"data": b"new"}
    assert os.listdir(target.parent) == ["out"]


def test_missing_folders_above_the_target_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert contents(tmp_path / "a" / "b" / "out")["data"] == b"new"


def test_an_empty_directory_is_a_free_target(target: Path) -> None:
    target.mkdir()
    write(target)
    assert contents(target)["data"] == b"new"


def test_an_error_in_the_block_leaves_nothing_behind(target: Path) -> None:
    with pytest.raises(KeyError), staged(target) as staging:  # noqa: PT012
        (staging / "data").write_bytes(b"half")
        raise KeyError
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_directory_is_never_touched(target: Path, force: bool) -> None:
    make(target, FOREIGN | {"data": b"x", "last": b""})
    with pytest.raises(OutputExistsError, match="not what lorashard would write"):
        write(target, force=force)
    assert contents(target) == FOREIGN | {"data": b"x", "last": b""}
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_never_touched(target: Path, force: bool) -> None:
    target.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="not what lorashard would write"):
        write(target, force=force)
    assert target.read_bytes() == b"mine"


def test_a_finished_target_is_refused_without_force(target: Path) -> None:
    write(target, b"old")
    with pytest.raises(OutputExistsError, match="exists") as raised:
        write(target)
    assert "`force=True`" in str(raised.value)
    assert contents(target)["data"] == b"old"


def test_force_replaces_a_finished_target(target: Path) -> None:
    write(target, b"old")
    write(target, b"new", force=True)
    assert contents(target) == {"data": b"new", "last": b""}
    assert os.listdir(target.parent) == ["out"]


def test_force_keeps_the_old_target_to_the_last_moment(target: Path) -> None:
    write(target, b"old")
    with pytest.raises(KeyError), staged(target, force=True) as staging:  # noqa: PT012
        (staging / "data").write_bytes(b"half")
        assert contents(target)["data"] == b"old"
        raise KeyError
    assert contents(target) == {"data": b"old", "last": b""}


def test_a_reader_never_misses_a_target_that_is_replaced(target: Path) -> None:
    write(target, b"old")
    looks = "import os, sys\nwhile os.path.exists(sys.argv[1]): pass\nprint('gone')"
    with subprocess.Popen([sys.executable, "-c", looks, target], stdout=subprocess.PIPE) as reader:
        try:
            for _ in range(50):
                write(target, b"new", force=True)
            assert reader.poll() is None, "there was a moment without the target"
        finally:
            reader.kill()


def test_a_link_to_a_foreign_directory_is_left_alone(target: Path, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", FOREIGN)
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError):
        write(target, force=True)
    assert target.is_symlink()
    assert contents(tmp_path / "elsewhere") == FOREIGN


@pytest.mark.parametrize("pointed_to", ["absent", "empty"])
def test_a_link_stays_one_and_what_it_points_to_is_written(
    target: Path, tmp_path: Path, pointed_to: str
) -> None:
    (tmp_path / "empty").mkdir()
    target.symlink_to(tmp_path / pointed_to)
    write(target)
    assert target.is_symlink()
    assert contents(tmp_path / pointed_to) == contents(target) != {}


def test_force_on_a_link_to_a_finished_target_leaves_nothing_beside_it(
    target: Path, tmp_path: Path
) -> None:
    write(tmp_path / "real", b"old")
    target.symlink_to(tmp_path / "real")
    try:
        write(target, b"new", force=True)
    except OutputExistsError:
        assert target.is_symlink()
    assert set(os.listdir(tmp_path)) == {"real", "out"}
    assert contents(tmp_path / "real")["data"] in (b"old", b"new")


def test_a_second_writer_of_the_same_target_is_locked_out(target: Path) -> None:
    with staged(target) as staging:
        (staging / "data").write_bytes(b"first")
        with pytest.raises(OutputExistsError, match="another lorashard is writing it"):
            write(target, b"second")
        (staging / "last").write_bytes(b"")
    assert contents(target)["data"] == b"first"


def test_a_second_process_is_locked_out(target: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with staged(target):
        done = run_cli("split", adapter, "--ep-size", 2, "-o", target)
    assert (done.returncode, done.stdout) == (5, "")
    assert "another lorashard is writing it" in done.stderr


def test_what_a_killed_run_left_is_cleared(target: Path) -> None:
    stale = make(target.parent / ".out.lorashard-partial", {"data": b"half", "junk": b""})
    (stale / "folder").mkdir()
    (stale / "link").symlink_to("/etc")
    write(target)
    assert contents(target) == {"data": b"new", "last": b""}
    assert os.listdir(target.parent) == ["out"]


def test_a_staging_directory_that_is_a_link_is_not_followed(target: Path, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", FOREIGN)
    (tmp_path / ".out.lorashard-partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((OSError, ShardError)):
        write(target)
    assert contents(tmp_path / "elsewhere") == FOREIGN


def test_a_directory_with_only_a_staging_name_in_it_is_not_free(target: Path) -> None:
    make(target, {".lorashard-partial": b"mine"})
    with pytest.raises(ShardError):
        write(target)
    assert contents(target) == {".lorashard-partial": b"mine"}


def test_a_finished_writer_does_not_delete_the_work_of_the_next(target: Path) -> None:
    """Between the first writer's rename and its cleaning, which waits for fsync, a second starts."""
    write(target, b"old")
    first = staged(target, force=True)
    fill(first.__enter__(), b"first")
    second = []
    fsync = os.fsync

    def slow_disk(fd: int) -> None:
        fsync(fd)
        if os.fstat(fd).st_ino == target.parent.stat().st_ino and not second:
            second.append(staged(target, force=True))
            fill(second[0].__enter__(), b"second")

    os.fsync = slow_disk
    try:
        first.__exit__(None, None, None)
    finally:
        os.fsync = fsync
    second[0].__exit__(None, None, None)
    assert contents(target) == {"data": b"second", "last": b""}


def test_a_read_only_place_is_said_to_be_one(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=64k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(ShardError, match="cannot be written") as raised:
            write(tmp_path / "disk" / "out")
        assert raised.value.exit_code == 5


@pytest.mark.parametrize("reached", ["file/out", "out" + "x" * 300, "x" * 240])
def test_an_impossible_target_is_a_shard_error(tmp_path: Path, reached: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError):
        write(tmp_path / reached)


@pytest.mark.parametrize("spelled", [".", "./", "inner/.."])
def test_the_current_directory_is_a_target_or_a_shard_error(tmp_path: Path, spelled: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-m", "lorashard", "split", adapter, "--ep-size", "2", "-o", spelled]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, check=False, cwd=tmp_path / "here", env=environment)
    assert done.returncode in (0, 5)
    assert set(os.listdir(tmp_path)) == {"adapter", "here"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("before", ["absent", "empty"])
def test_what_appears_during_the_work_is_never_touched(
    target: Path, force: bool, before: str
) -> None:
    if before == "empty":
        target.mkdir()
    with pytest.raises(OutputExistsError), staged(target, force=force) as staging:  # noqa: PT012
        fill(staging, b"new")
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_bytes(b"three years")
    assert contents(target) == FOREIGN
    assert os.listdir(target.parent) == ["out"]


def test_a_finished_target_that_appears_during_the_work_needs_force(target: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists"), staged(target) as staging:  # noqa: PT012
        fill(staging, b"new")
        make(target, {"data": b"other", "last": b""})
    assert contents(target)["data"] == b"other"


@pytest.mark.parametrize("left", [".out.lorashard-old", ".out.lorashard-partial"])
def test_what_is_left_beside_a_finished_target_can_be_cleared(target: Path, left: str) -> None:
    write(target)
    make(target.with_name(left), {"last": b""})
    clear_leftovers(target)
    assert os.listdir(target.parent) == ["out"]


def test_the_work_of_another_run_is_not_cleared(target: Path) -> None:
    write(target)
    with staged(target, force=True) as staging:
        fill(staging, b"newer")
        clear_leftovers(target)
    assert contents(target) == {"data": b"newer", "last": b""}
