"""A real full disk, and targets that are mount points of their own."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter, verify_shards
from lorashard.errors import ShardError
from tests.tiny import contents, mounted_tmpfs, per_expert_tensors, run_cli, save_adapter

PAGE = 4096
REQUEST = SplitRequest(ep_size=2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=256k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        yield tmp_path / "disk"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", per_expert_tensors(layers=6))


@pytest.fixture
def unlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disk filled up only after the look at it."""
    monkeypatch.setattr("lorashard.split.run.check_disk_space", lambda *_, **__: None)


@pytest.mark.parametrize("command", ["split", "split --dry-run", "merge", "convert"])
def test_what_does_not_fit_is_refused_with_figures_before_anything_is_written(
    disk: Path, tmp_path: Path, command: str
) -> None:
    large = save_adapter(tmp_path / "large", per_expert_tensors(hidden=8192))
    split_adapter(large, tmp_path / "shards", REQUEST)
    leave_free(disk, 20)
    words: dict[str, tuple[object, ...]] = {
        "split": ("split", large, "--ep-size", 2),
        "split --dry-run": ("split", large, "--ep-size", 2, "--dry-run"),
        "merge": ("merge", tmp_path / "shards"),
        "convert": ("convert", tmp_path / "shards", "--layout", "fused"),
    }
    done = run_cli(*words[command], "-o", disk / "new" / "out", "-q")
    assert done.returncode == 5
    said = (
        rf"error: {disk}/new/out: \d\.\d\d MB are to be written, and {disk} has 0\.08 MB free\.\n"
    )
    assert re.fullmatch(
        said + "  Free some space, or choose another place with -o\\.\n", done.stderr
    )
    assert os.listdir(disk) == ["filler"]


def leave_free(disk: Path, pages: int) -> None:
    free = os.statvfs(disk).f_bavail
    (disk / "filler").write_bytes(b"x" * PAGE * (free - pages))
    assert os.statvfs(disk).f_bavail == pages


@pytest.mark.usefixtures("unlooked")
def test_a_disk_full_at_any_stage_leaves_nothing_behind(disk: Path, adapter: Path) -> None:
    for pages in range(100):
        leave_free(disk, pages)
        try:
            split_adapter(adapter, disk / "out", REQUEST)
        except ShardError as err:
            assert "no space left while writing out" in str(err)  # noqa: PT017
            assert os.listdir(disk) == ["filler"]
            (disk / "filler").unlink()
        else:
            assert pages > 5
            assert verify_shards(disk / "out") == ()
            return
    pytest.fail("the disk is large enough by now")


@pytest.mark.usefixtures("unlooked")
def test_a_full_disk_keeps_the_old_target(disk: Path, adapter: Path) -> None:
    split_adapter(adapter, disk / "out", REQUEST)
    before = contents(disk / "out")
    leave_free(disk, 3)
    with pytest.raises(ShardError, match="no space left"):
        split_adapter(adapter, disk / "out", SplitRequest(ep_size=1), force=True)
    assert contents(disk / "out") == before


@pytest.mark.usefixtures("unlooked")
def test_a_full_disk_takes_back_the_folders_it_made(disk: Path, adapter: Path) -> None:
    leave_free(disk, 3)
    with pytest.raises(ShardError, match="no space left"):
        split_adapter(adapter, disk / "new" / "out", REQUEST)
    assert os.listdir(disk) == ["filler"]


def test_a_file_size_limit_is_a_shard_error(tmp_path: Path, adapter: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(ShardError):
            split_adapter(adapter, tmp_path / "out", REQUEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_empty_mount_point_is_a_free_target(disk: Path, adapter: Path) -> None:
    split_adapter(adapter, disk, REQUEST)
    assert verify_shards(disk, against=adapter) == ()


def test_a_mount_point_with_lost_and_found_is_a_free_target(disk: Path, adapter: Path) -> None:
    (disk / "lost+found").mkdir()
    split_adapter(adapter, disk, REQUEST)
    assert (disk / "lorashard.json").exists()


@pytest.mark.usefixtures("unlooked")
def test_an_error_before_the_move_leaves_a_mount_point_empty(disk: Path, tmp_path: Path) -> None:
    large = save_adapter(tmp_path / "large", per_expert_tensors(hidden=8192))
    with pytest.raises(ShardError, match="no space left"):
        split_adapter(large, disk, REQUEST)
    assert os.listdir(disk) == []


def test_a_mount_point_with_something_in_it_is_left_alone(disk: Path, adapter: Path) -> None:
    (disk / "mine").write_bytes(b"x")
    with pytest.raises(ShardError, match="not what lorashard would write"):
        split_adapter(adapter, disk, REQUEST, force=True)
    assert contents(disk) == {"mine": b"x"}


def test_force_on_a_mount_point_removes_the_old_rank_files(disk: Path, adapter: Path) -> None:
    split_adapter(adapter, disk, REQUEST)
    split_adapter(adapter, disk, SplitRequest(ep_size=3), force=True)
    assert verify_shards(disk, against=adapter) == ()


@pytest.mark.parametrize("beside", ["lost+found", ".lorashard-partial"])
def test_force_works_on_a_mount_point_with_more_than_shards(
    disk: Path, adapter: Path, beside: str
) -> None:
    split_adapter(adapter, disk, REQUEST)
    (disk / beside).mkdir()
    split_adapter(adapter, disk, REQUEST, force=True)


def test_what_a_killed_run_left_does_not_give_away_what_stands_beside_it(
    disk: Path, adapter: Path
) -> None:
    (disk / ".lorashard-partial").mkdir()
    (disk / "mine").write_bytes(b"x")
    with pytest.raises(ShardError, match="not what lorashard would write"):
        split_adapter(adapter, disk, REQUEST)
    assert contents(disk) == {"mine": b"x"}
