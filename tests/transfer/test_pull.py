"""Pulling from a local directory: what is fetched, what a failure keeps, what is never touched.

Pulls over a network are in tests/system/test_remote_adapters.py and test_object_storage.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorashard import SplitRequest, pull_shards, split_adapter, verify_shards
from lorashard.errors import LorashardError, ManifestError, OutputExistsError, ShardError
from lorashard.transfer.pull import find_shards
from tests.tiny import (
    RANK_FILES,
    contents,
    flip_bit,
    mounted_tmpfs,
    per_expert_tensors,
    run_cli,
    save_adapter,
)

ALWAYS = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorashard.json",
    "replicated.safetensors",
}
FOREIGN = {"thesis.txt": b"three years"}


def make_shards(folder: Path, seed: int = 0, hidden: int = 64) -> Path:
    adapter = save_adapter(folder / f"adapter-{seed}", per_expert_tensors(seed, hidden))
    split_adapter(adapter, folder / f"shards-{seed}", SplitRequest(ep_size=2))
    return folder / f"shards-{seed}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("source"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    directory = tmp_path / "foreign"
    directory.mkdir()
    for name, content in FOREIGN.items():
        (directory / name).write_bytes(content)
    return directory


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.lorashard-pull"


@pytest.mark.parametrize("ep_ranks", [(0,), (1,), (0, 1), (1, 1)])
def test_a_pull_has_the_files_of_its_ranks_and_nothing_else(
    shards: Path, target: Path, ep_ranks: tuple[int, ...]
) -> None:
    fetched: list[int] = []
    manifest = pull_shards(shards, target, ep_ranks, progress=fetched.append)
    names = ALWAYS | {RANK_FILES[k] for k in ep_ranks}
    assert contents(target) == {n: c for n, c in contents(shards).items() if n in names}
    fetched_names = names - {"lorashard.json", "adapter_model.safetensors"}  # the notice is written
    assert sum(fetched) == sum(len(contents(target)[n]) for n in fetched_names)
    assert manifest == find_shards(shards).manifest
    assert verify_shards(target, ep_ranks=ep_ranks) == ()
    assert os.listdir(target.parent) == ["out"]


def test_a_second_pull_adds_and_fetches_nothing_twice(shards: Path, target: Path) -> None:
    pull_shards(shards, target, (0,))
    inodes = {name: (target / name).stat().st_ino for name in os.listdir(target)}
    fetched: list[int] = []
    pull_shards(shards, target, (0, 1), progress=fetched.append)
    assert contents(target) == contents(shards)
    assert sum(fetched) == (shards / RANK_FILES[1]).stat().st_size
    assert {name: (target / name).stat().st_ino for name in inodes} == inodes


def test_a_file_that_was_cut_short_is_fetched_again(shards: Path, target: Path) -> None:
    pull_shards(shards, target, (0, 1))
    os.truncate(target / RANK_FILES[0], 10)
    pull_shards(shards, target, (0, 1))
    assert contents(target) == contents(shards)


def test_other_shards_are_replaced_only_with_force(
    shards: Path, target: Path, tmp_path: Path
) -> None:
    other = make_shards(tmp_path, seed=1)
    pull_shards(other, target, (0,))
    with pytest.raises(OutputExistsError, match="exists"):
        pull_shards(shards, target, (0, 1))
    assert not work_of(target).exists()
    pull_shards(shards, target, (0, 1), force=True)
    assert contents(target) == contents(shards)


def test_what_is_not_a_shard_directory_is_left_alone_with_force_too(
    shards: Path, foreign: Path
) -> None:
    with pytest.raises(OutputExistsError, match="not what lorashard would write"):
        pull_shards(shards, foreign, (0,), force=True)
    assert contents(foreign) == FOREIGN
    assert os.listdir(foreign.parent) == ["foreign"]


def test_a_place_without_a_manifest_is_refused_before_anything_is_made(
    foreign: Path, target: Path
) -> None:
    with pytest.raises(ManifestError):
        pull_shards(foreign, target / "deep" / "out", (0,))
    assert not target.exists()


def test_wrong_bytes_are_refused_and_the_rest_is_kept(tmp_path: Path, target: Path) -> None:
    source = make_shards(tmp_path)
    flip_bit(source / RANK_FILES[1], -1)
    with pytest.raises(ShardError, match=f"{RANK_FILES[1]}: its bytes are not those"):
        pull_shards(source, target, (0, 1))
    assert not target.exists()
    assert not (work_of(target) / f"{RANK_FILES[1]}.part").exists()
    flip_bit(source / RANK_FILES[1], -1)
    pull_shards(source, target, (0, 1))
    assert contents(target) == contents(source)


def test_half_a_file_is_continued_and_proven_as_a_whole(shards: Path, target: Path) -> None:
    work = work_of(target)
    work.mkdir()
    (work / "lorashard.json").write_bytes((shards / "lorashard.json").read_bytes())
    whole = (shards / RANK_FILES[0]).read_bytes()
    part = work / f"{RANK_FILES[0]}.part"
    part.write_bytes(b"\xff" + whole[1:500])
    with pytest.raises(ShardError, match="its bytes are not those"):
        pull_shards(shards, target, (0,))
    part.write_bytes(whole[:500])
    pull_shards(shards, target, (0,))
    assert (target / RANK_FILES[0]).read_bytes() == whole


def test_a_link_under_the_name_of_the_work_directory_is_refused(
    shards: Path, target: Path, foreign: Path
) -> None:
    """In a shared folder anybody can make one that points to another user's files."""
    work_of(target).symlink_to(foreign)
    with pytest.raises(ShardError, match="is a link or a file"):
        pull_shards(shards, target, (0,))
    assert contents(foreign) == FOREIGN
    assert work_of(target).is_symlink()
    assert not target.exists()


def test_a_link_under_the_name_of_a_part_is_not_written_through(
    shards: Path, target: Path, foreign: Path
) -> None:
    work_of(target).mkdir()
    (work_of(target) / "lorashard.json").write_bytes((shards / "lorashard.json").read_bytes())
    (work_of(target) / f"{RANK_FILES[0]}.part").symlink_to(foreign / "thesis.txt")
    with pytest.raises(ShardError, match="cannot be written"):
        pull_shards(shards, target, (0,))
    assert contents(foreign) == FOREIGN


def test_a_second_pull_of_the_same_target_is_locked_out(shards: Path, target: Path) -> None:
    refused: list[LorashardError] = []

    def meanwhile(_: int) -> None:
        if not refused:
            with pytest.raises(OutputExistsError, match="another lorashard is writing it") as other:
                pull_shards(shards, target, (1,))
            refused.append(other.value)

    pull_shards(shards, target, (0,), progress=meanwhile)
    assert refused
    assert RANK_FILES[0] in os.listdir(target)
    pull_shards(shards, target, (1,))
    assert contents(target) == contents(shards)


def test_of_pulls_at_once_each_succeeds_or_is_locked_out(shards: Path, tmp_path: Path) -> None:
    """One may lock the work directory when the other has just removed it, or finished the target."""
    for number in range(20):
        target, start, errors = tmp_path / str(number), threading.Barrier(3), []

        def pull(target: Path = target, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                pull_shards(shards, target, (0, 1))
            except LorashardError as err:
                errors.append(err)  # noqa: B023 - the threads end within the round

        threads = [threading.Thread(target=pull) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) < 3
        assert all("another lorashard is writing it" in str(err) for err in errors), errors
        assert contents(target) == contents(shards)
        assert not work_of(target).exists()


def test_a_pull_that_begins_when_another_has_just_finished_only_checks(
    shards: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked at the target before, when there was none."""
    mkdir, finished = os.mkdir, []

    def finish_another_first(path: object, *mode: int) -> None:
        if path == work_of(target) and not finished:
            finished.append(path)
            pull_shards(shards, target, (0,))
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", finish_another_first)
    pull_shards(shards, target, (0, 1))
    assert finished
    assert contents(target) == contents(shards)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == (
        tmp_path.stat().st_dev
    ):
        pytest.skip("there is only one file system")
    with tempfile.TemporaryDirectory(dir=shared_memory) as name:
        yield Path(name)


@pytest.mark.parametrize("pointed_to", ["absent", "empty"])
def test_a_link_to_another_file_system_stays_one_and_is_filled(
    shards: Path, target: Path, other_disk: Path, pointed_to: str
) -> None:
    (other_disk / "empty").mkdir()
    target.symlink_to(other_disk / pointed_to)
    pull_shards(shards, target, (0,))
    pull_shards(shards, target, (1,))
    assert target.is_symlink()
    assert contents(other_disk / pointed_to) == contents(shards)
    assert {"absent", "empty"} >= set(os.listdir(other_disk))


@pytest.mark.parametrize("reached", ["file/out", "file/a/out", "x" * 250])
def test_an_impossible_target_is_a_shard_error(shards: Path, tmp_path: Path, reached: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    done = run_cli("pull", shards, "--ep-rank", 0, "-o", tmp_path / reached)
    assert done.returncode == 5, done.stderr
    assert "cannot be written" in done.stderr
    assert "unexpected" not in done.stderr
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_full_disk_keeps_what_was_fetched_for_the_next_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_shards(tmp_path, hidden=4096)
    # As if the disk filled up only after the look at it.
    monkeypatch.setattr("lorashard.transfer.pull.check_disk_space", lambda *_, **__: None)
    with mounted_tmpfs(tmp_path / "disk", "size=160k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        target = tmp_path / "disk" / "out"
        with pytest.raises(ShardError, match="no space left while writing out") as raised:
            pull_shards(source, target, (0, 1))
        assert raised.value.exit_code == 5
        assert "what was fetched is kept" in str(raised.value)
        assert not target.exists()
        kept = {p.name for p in work_of(target).iterdir() if p.stat().st_size}
        assert kept > {"lorashard.json"}
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        pull_shards(source, target, (0, 1))
        assert contents(target) == contents(source)
        assert os.listdir(tmp_path / "disk") == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_file_of_the_target_is_fetched_again(
    shards: Path, target: Path, force: bool
) -> None:
    pull_shards(shards, target, [0])
    flip_bit(target / RANK_FILES[0], -1)
    pull_shards(shards, target, [0], force=force)
    assert (target / RANK_FILES[0]).read_bytes() == (shards / RANK_FILES[0]).read_bytes()
    assert verify_shards(target, ep_ranks=[0]) == ()


def test_a_pull_that_does_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    source = make_shards(tmp_path, hidden=4096)
    with mounted_tmpfs(tmp_path / "disk", "size=160k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        target = tmp_path / "disk" / "out"
        for argv in ((), ("--dry-run",)):
            done = run_cli("pull", source, "--node-ranks", "0-1", "-o", target, *argv)
            assert done.returncode == 5
            assert re.match(
                rf"error: {target}: 0\.\d\d MB are to be written, and {target.parent} has "
                r"0\.1\d MB free\.\n",
                done.stderr,
            )
        assert not target.exists()
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        pull_shards(source, target, (0, 1))
        assert contents(target) == contents(source)
        assert os.listdir(tmp_path / "disk") == ["out"]


def test_a_dry_run_says_what_would_be_fetched_and_writes_nothing(
    shards: Path, target: Path
) -> None:
    argv = ("pull", shards, "--ep-rank", 0, "-o", target, "--json")
    planned = json.loads(run_cli(*argv, "--dry-run").stdout)
    assert planned["dry_run"] is True
    assert not any(target.parent.iterdir())
    done = json.loads(run_cli(*argv).stdout)
    assert done["dry_run"] is False
    assert planned["files"] == {n: s for n, s in done["files"].items() if n != "lorashard.json"}
    more = run_cli("pull", shards, "--node-ranks", "0-1", "-o", target, "--dry-run", "--json")
    assert list(json.loads(more.stdout)["files"]) == [RANK_FILES[1]]


def test_a_dry_run_fails_where_the_pull_would(shards: Path, foreign: Path) -> None:
    done = run_cli("pull", shards, "--ep-rank", 0, "-o", foreign, "--dry-run")
    assert done.returncode == 5
    assert contents(foreign) == FOREIGN
