"""Whatever ends `split`, and wherever: the target is absent, the old one or the finished new one.

The command runs for real; tests/fault_runner.py makes its n-th system call fail, for every n. That
the power may fail as well is tested by the order of fsync and rename.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorashard import verify_shards
from tests.faulty_runs import Runner, runner
from tests.file_calls import CLEANING, WRITING
from tests.tiny import RANK_FILES, contents, mounted_tmpfs, per_expert_tensors, save_adapter

ENDLESS = 500


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    """Runs one command with a fault; see fault_runner.py for its answer."""
    with runner() as run:
        yield run


class Place:
    """A folder with an adapter, and in it the target of every run."""

    def __init__(self, folder: Path, old: dict[str, bytes]) -> None:
        self.folder = folder
        self.adapter = save_adapter(folder / "adapter")
        self.target = folder / "out"
        self.old = old
        self.argv = ["split", self.adapter, "--ep-size", 2, "-o", self.target]
        if old:
            self.argv.append("--force")
        self.restore()

    def restore(self) -> None:
        """Put the old target, or none, in place."""
        if not self.target.exists() or contents(self.target) != self.old:
            subprocess.run(["rm", "-rf", self.target], check=True)
            if self.old:
                self.target.mkdir()
                for name, content in self.old.items():
                    (self.target / name).write_bytes(content)

    def state(self) -> str:
        """absent, old or new; anything else fails the test."""
        if not self.target.exists():
            assert not self.old, "the old one is gone"
            return "absent"
        if self.old and contents(self.target) == self.old:
            return "old"
        assert verify_shards(self.target, against=self.adapter) == ()
        return "new"

    def beside(self) -> set[str]:
        return set(os.listdir(self.folder)) - {"adapter", "out"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: thousands of fsyncs wait for a disk otherwise."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(params=["nothing there", "an old one to replace"])
def place(request: pytest.FixtureRequest, run: Runner, folder: Path) -> Place:
    old: dict[str, bytes] = {}
    if request.param == "an old one to replace":
        other = save_adapter(folder / "before" / "adapter", per_expert_tensors(seed=1))
        run("split", other, "--ep-size", 3, "-o", folder / "before" / "out")
        old = contents(folder / "before" / "out")
    (folder / "here").mkdir()
    return Place(folder / "here", old)


def clear(directory: Path) -> None:
    for name in os.listdir(directory):
        subprocess.run(["rm", "-rf", directory / name], check=True)


def every_point(run: Runner, place: Place, action: str, **options: Any) -> Iterator[dict[str, Any]]:
    """Run the command with the fault at its 1st, 2nd, ... call until none is left."""
    for at in range(1, ENDLESS):
        place.restore()
        answer = run(*place.argv, action=action, at=at, **options)
        if not answer["reached"]:
            assert answer["code"] == 0, answer
            assert at > 10, "the calls are no longer the ones that fault_runner.py replaces"
            return
        yield answer
    pytest.fail("it never ends")


def test_a_kill_leaves_a_whole_target_or_none_and_the_same_command_finishes_it(
    run: Runner, place: Place
) -> None:
    for answer in every_point(run, place, "kill", calls=WRITING + CLEANING):
        assert answer["code"] == -9
        finished = place.state() == "new" and not place.old
        again = run(*place.argv)
        assert again["code"] == (5 if finished else 0), again
        assert place.state() == "new"
        assert place.beside() == set()


def test_sigterm_at_any_point_leaves_nothing_else_behind(run: Runner, place: Place) -> None:
    for answer in every_point(run, place, "term"):
        assert answer["code"] == 143, answer
        assert place.state() in ("absent", "old", "new")
        assert place.beside() == set()


def test_sigterm_during_the_cleaning_leaves_nothing_else_behind(run: Runner, folder: Path) -> None:
    place = Place(folder, {})
    assert run(*place.argv)["code"] == 0
    for at in range(1, ENDLESS):
        if not run(*place.argv, "--force", action="term", at=at, calls=CLEANING)["reached"]:
            assert at > 1
            return
        assert place.beside() == set()
    pytest.fail("it never ends")


@pytest.mark.parametrize(
    ("failure", "words"), [("EIO", "Input/output error"), ("ENOSPC", "no space left")]
)
def test_an_error_of_any_call_leaves_nothing_else_behind(
    run: Runner, place: Place, failure: str, words: str
) -> None:
    for answer in every_point(run, place, failure):
        assert answer["code"] in (5, 0), answer  # 0: a call that may fail
        assert answer["code"] == 0 or words in answer["stderr"], answer
        assert place.state() in ("absent", "old", "new")
        assert place.beside() == set()


def test_a_killed_merge_can_be_done_again(run: Runner, folder: Path) -> None:
    adapter = save_adapter(folder / "adapter")
    run("split", adapter, "--ep-size", 2, "-o", folder / "shards")
    argv = ["merge", folder / "shards", "-o", folder / "merged"]
    for at in range(1, ENDLESS):
        answer = run(*argv, action="kill", at=at)
        if not answer["reached"]:
            assert at > 3
            return
        assert (folder / "merged").exists() or run(*argv)["code"] == 0
        assert contents(folder / "merged") == contents(adapter)
        assert set(os.listdir(folder)) == {"adapter", "shards", "merged"}
        clear(folder / "merged")
        (folder / "merged").rmdir()
    pytest.fail("it never ends")


@pytest.fixture
def shards(run: Runner, folder: Path) -> Path:
    run("split", save_adapter(folder / "adapter"), "--ep-size", 2, "-o", folder / "shards")
    return folder / "shards"


def inode(path: Path) -> int:
    return path.stat().st_ino


def renamed_to(path: Path, recorded: list[Any]) -> int:
    """When what is at `path` now was renamed to it, as an index into the recorded calls."""
    return next(
        i for i, call in enumerate(recorded) if call[:3] == ["rename", inode(path), str(path)]
    )


def synced(recorded: list[Any]) -> set[int]:
    return {number for call, number, *_ in recorded if call == "fsync"}


COMMANDS = {
    "split": ("split", "adapter", "--ep-size", 3),
    "reshard": ("reshard", "shards", "--ep-size", 3),
    "merge": ("merge", "shards"),
    "convert": ("convert", "shards", "--layout", "per_expert"),
    "pull": ("pull", "shards", "--node-ranks", "0-1"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_all_is_synced_before_the_target_appears_and_its_name_after(
    run: Runner, folder: Path, shards: Path, command: str, force: bool
) -> None:
    target = folder / "made" / "out"

    def argv(name: str, source: str, *options: object) -> list[object]:
        return [name, folder / source, *options, "-o", target]

    if force:  # `pull` would only add to what it has pulled itself
        old = COMMANDS["reshard" if command == "pull" else command]
        assert run(*argv(*old))["code"] == 0
    answer = run(*argv(*COMMANDS[command]), *["--force"] * force, action="record")
    assert answer["code"] == 0, answer
    recorded = answer["recorded"]
    appeared = renamed_to(target, recorded)
    before, after = synced(recorded[:appeared]), synced(recorded[appeared:])
    assert len(os.listdir(target)) >= 2
    for path in (target, *target.iterdir()):
        assert inode(path) in before, f"{path} is not synced before it is renamed"
    assert inode(target.parent) in after


def test_a_file_that_pull_adds_is_synced_before_it_has_its_name(
    run: Runner, folder: Path, shards: Path
) -> None:
    argv = ["pull", shards, "-o", folder / "out", "--ep-rank"]
    assert run(*argv, 0)["code"] == 0
    recorded = run(*argv, 1, action="record")["recorded"]
    added = folder / "out" / RANK_FILES[1]
    appeared = renamed_to(added, recorded)
    assert inode(added) in synced(recorded[:appeared])
    assert inode(folder / "out") in synced(recorded[appeared:])


@pytest.fixture
def mount(run: Runner, tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "mount", "size=1m") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        yield tmp_path / "mount"


def test_in_a_mount_point_all_else_is_durable_before_the_manifest_appears(
    run: Runner, mount: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    recorded = run("split", adapter, "--ep-size", 2, "-o", mount, action="record")["recorded"]
    finished = renamed_to(mount / "lorashard.json", recorded)
    others = [path for path in mount.iterdir() if path.name != "lorashard.json"]
    last_of_them = max(renamed_to(path, recorded) for path in others)
    for path in mount.iterdir():
        assert inode(path) in synced(recorded[: renamed_to(path, recorded)])
    assert inode(mount) in synced(recorded[last_of_them:finished])
    assert inode(mount) in synced(recorded[finished:])


@pytest.mark.parametrize("action", ["kill", "term"])
def test_an_interrupted_move_into_a_mount_point_can_be_done_again(
    run: Runner, mount: Path, tmp_path: Path, action: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    argv = ["split", adapter, "--ep-size", 2, "-o", mount]
    for at in range(1, ENDLESS):
        clear(mount)
        if not run(*argv, action=action, at=at, calls=("rename",))["reached"]:
            assert at > 1
            return
        if not (mount / "lorashard.json").exists():
            assert action == "kill" or os.listdir(mount) == []
            assert run(*argv)["code"] == 0
        assert verify_shards(mount, against=adapter) == ()
    pytest.fail("it never ends")


@pytest.mark.parametrize("action", ["kill", "term"])
def test_a_replaced_mount_point_is_never_a_mixture(
    run: Runner, mount: Path, tmp_path: Path, action: str
) -> None:
    adapters = [
        save_adapter(tmp_path / str(seed), per_expert_tensors(seed=seed)) for seed in range(2)
    ]
    command = ["--ep-size", 2, "-o", mount]
    for at in range(1, ENDLESS):
        clear(mount)
        assert run("split", adapters[0], *command)["code"] == 0
        answer = run(
            "split", adapters[1], *command, "--force", action=action, at=at, calls=("rename",)
        )
        if (mount / "lorashard.json").exists():
            found = [f for f in verify_shards(mount) if "lorashard-partial" not in f]
            assert found == [], answer
        if not answer["reached"]:
            assert at > 1
            return
    pytest.fail("it never ends")
