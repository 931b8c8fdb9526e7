"""Whatever fails, at whichever call on a file: the old state, a resumable one, or the finished one.

Each verb runs for real, in a folder of its own, and one of its calls fails: the process is killed, the
disk is full or broken, once or from there on. Then the same is run again, without a fault.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorashard.errors import LorashardError
from lorashard.shards.directory import has_digest, read_manifest
from lorashard.storage.syscalls import is_in_memory
from tests.faulty_runs import Course, Runner, runner
from tests.file_calls import CLEANING, READING, WRITING
from tests.tiny import contents, per_expert_tensors, save_adapter

# LORASHARD_FAULTS=1 tries every call, for an hour; otherwise it is this many of each verb and fault.
MOST = None if os.environ.get("LORASHARD_FAULTS") == "1" else 1
ALL = (*READING, *WRITING, *CLEANING)
# How one of two is told of the other. The last two are where the target is what it reads.
REFUSED = (
    "another lorashard is writing it", "exists", "appeared", "has not begun", "Copy the file again",
    "Copy the directory again",
)  # fmt: skip
# What goes wrong, and at which calls.
FAULTS = {
    "kill": ALL,
    "term": ALL,
    "EIO": (*READING, *WRITING),
    "EIO+": ALL,
    "ENOSPC": WRITING,
    "ENOSPC+": ("mkdir", "write", "truncate", "fsync"),
    "EDQUOT": WRITING,
    "ESTALE": (*READING, *WRITING),
}


@dataclass(frozen=True)
class Verb:
    """One thing that lorashard does, in a folder that has the inputs `prepare` names.

    work: the job. finished: the paths that appear whole or not at all, once it is done.
    again: how the same ends where it is done already.
    """

    prepare: tuple[str, ...]
    work: dict[str, Any]
    finished: tuple[str, ...] = ()
    again: int = 0


def command(words: str) -> dict[str, Any]:
    return {"argv": words.split()}


VERBS = {
    "split": Verb(("adapter",), command("split adapter --ep-size 2 -o new/out"), ("new/out",), 5),
    "split --force": Verb(
        ("adapter", "out"), command("split adapter --ep-size 3 -o out --force"), ("out",)
    ),
    "split --resume": Verb(
        ("adapter", "shards"), command("split adapter --ep-size 2 -o shards --resume"), ("shards",)
    ),
    "split --resume --force": Verb(
        ("adapter", "out"), command("split adapter --ep-size 2 -o out --resume --force"), ("out",)
    ),
    "split, a batch": Verb(
        ("adapter", "other"),
        command("split adapter other --ep-size 2 -o new --resume"),
        ("new/adapter-ep2", "new/other-ep2"),
    ),
    "merge": Verb(("shards",), command("merge shards -o out"), ("out",), 5),
    "merge --force": Verb(
        ("shards", "plain out"), command("merge shards -o out --force"), ("out",)
    ),
    "convert": Verb(("shards",), command("convert shards --layout fused -o out"), ("out",), 5),
    "reshard": Verb(("shards",), command("reshard shards --ep-size 3 -o out"), ("out",), 5),
    "reshard in place": Verb(
        ("shards",), command("reshard shards --ep-size 3 -o shards --force"), ("shards",)
    ),
    "pull": Verb(("shards",), command("pull shards --node-ranks 0-1 -o new/out"), ("new/out",)),
    "pull another rank": Verb(
        ("shards", "pulled"),
        command("pull shards --ep-rank 1 -o pulled"),
        ("pulled/ep-00001-of-00002.safetensors",),
    ),
    "pull --force": Verb(
        ("shards", "out"), command("pull shards --node-ranks 0-1 -o out --force"), ("out",)
    ),
    "push": Verb(("shards",), command("push shards file://{folder}/remote --force")),
    "verify": Verb(("shards", "adapter"), command("verify shards --against adapter")),
    "inspect": Verb(("shards",), command("inspect shards")),
    "commit": Verb(
        ("six experts",),
        {"commit": {"adapter": "six", "out": "new/out", "failing": 0}},
        ("new/out",),
        5,
    ),
    "commit, the other rank": Verb(
        ("six experts",),
        {"commit": {"adapter": "six", "out": "new/out", "failing": 1}},
        ("new/out",),
        5,
    ),
    "commit in place": Verb(
        ("six experts", "out"),
        {"commit": {"adapter": "six", "out": "out", "failing": 0, "force": True}},
        ("out",),
    ),
    "commit to spare files": Verb(
        ("six experts", "spare"),
        {"commit": {"adapter": "six", "out": "out", "failing": 0}},
        ("out",),
        5,
    ),
    "publish": Verb(
        ("versions",),
        {"publish": {"directory": "versions", "version": 2, "servers": []}},
        ("versions/policy-v00001", "versions/policy-v00002"),
    ),
}


class Place:
    """The folder of a verb: as it was prepared, and as it is when all went well."""

    def __init__(self, run: Runner, verb: Verb, folder: Path) -> None:
        self._run, self._verb = run, verb
        self.folder = folder / "here"
        self._prepared = folder / "prepared"
        self._prepared.mkdir()
        for wanted in verb.prepare:
            prepare(run, wanted, self._prepared)
        self.before = contents(self._prepared)
        self.restore()
        answer = self.run()
        assert answer["code"] == 0, answer
        self.after = contents(self.folder)
        self.restore()
        self.counted: dict[str, int] = self.run(action="count", calls=ALL)["counted"]
        assert not self._verb.finished or self.after != self.before or "resume" in str(verb.work)

    def restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._prepared, self.folder, symlinks=True)

    @property
    def is_publisher(self) -> bool:
        return "publish" in self._verb.work

    def work(self) -> dict[str, Any]:
        work = dict(self._verb.work)
        if "argv" in work:
            work["argv"] = [word.format(folder=self.folder) for word in work["argv"]]
        return work

    def run(self, **how: Any) -> dict[str, Any]:
        return self._run.run(self.work(), self.folder, **how)

    def finished_paths(self) -> list[str]:
        return [str(self.folder / path) for path in self._verb.finished]

    def is_finished(self) -> bool:
        """Whether each path that a verb finishes is; anything between old and finished fails the test."""
        found = contents(self.folder)
        states = [self._is_new(path, found) for path in self._verb.finished]
        return all(states)

    def _is_new(self, path: str, found: dict[str, bytes]) -> bool:
        old, new, here = (_below(path, files) for files in (self.before, self.after, found))
        assert here in (old, new), f"{path} is neither the old one nor the finished one"
        return here == new

    def check_inputs(self) -> None:
        """What a verb only reads is as it was."""
        found = contents(self.folder)
        for name, content in self.before.items():
            if not any(name == path or name.startswith(path + "/") for path in self._verb.finished):
                assert name.startswith("versions/.") or "spare" in name or found[name] == content

    def check_nothing_half_written(self) -> None:
        """Whatever has a manifest that can be read has whole files under the names in it."""
        for path in self.folder.rglob("lorashard.json"):
            try:
                manifest = read_manifest(path.parent)
            except LorashardError:
                continue
            for name, file in manifest.files.items():
                written = path.parent / name
                assert not written.exists() or has_digest(written, file.digest), written

    def check_again(self) -> None:
        """The same once more, without a fault, ends as it would have, with nothing beside it."""
        was_finished = self.is_finished()
        answer = self.run()
        assert answer["code"] in ((0, self._verb.again) if was_finished else (0,)), answer
        found, expected = (_without_spare(files) for files in (contents(self.folder), self.after))
        assert found == expected, sorted(set(found) ^ set(expected))
        left = {path.name for path in self.folder.rglob("*") if path.is_dir()}
        assert not {name for name in left if "partial" in name or "-old" in name or "-pull" in name}


def _below(path: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: content for n, content in files.items() if n == path or n.startswith(path + "/")}


def _without_spare(files: dict[str, bytes]) -> dict[str, bytes]:
    """What is kept of an outdated version is only there to save time."""
    return {name: content for name, content in files.items() if ".lorashard-spare/" not in name}


def prepare(run: Runner, wanted: str, folder: Path) -> None:
    """Make one of the inputs that a `Verb` names."""

    def made(words: str) -> None:
        answer = run(*words.split(), folder=folder)
        assert answer["code"] == 0, answer

    def shards() -> None:
        save_adapter(folder / "adapter")
        made("split adapter --ep-size 2 -o shards")

    def other_shards() -> None:
        save_adapter(folder / "before", per_expert_tensors(seed=2))
        made("split before --ep-size 2 -o out")

    def six_experts() -> None:
        from tests.publish.test_writer import gathered

        gathered(folder).rename(folder / "six")

    def spare() -> None:
        made("split six --ep-size 2 -o spare")
        for name in ("lorashard.json", "adapter_config.json", "adapter_model.safetensors"):
            (folder / "spare" / name).unlink()
        (folder / "spare").rename(folder / ".lorashard-spare")

    def versions() -> None:
        for version in (1, 2):
            save_adapter(folder / "source", per_expert_tensors(seed=version))
            made(f"split source --ep-size 2 -o versions/policy-v0000{version}")

    {
        "adapter": lambda: save_adapter(folder / "adapter"),
        "other": lambda: save_adapter(folder / "other", per_expert_tensors(seed=1)),
        "shards": shards,
        "out": other_shards,
        "plain out": lambda: save_adapter(folder / "out", per_expert_tensors(seed=2)),
        "pulled": lambda: made("pull shards --ep-rank 0 -o pulled"),
        "six experts": six_experts,
        "spare": spare,
        "versions": versions,
    }[wanted]()


@pytest.fixture(scope="module")
def run_command() -> Iterator[Runner]:
    with runner() as run:
        yield run


@pytest.fixture(scope="module")
def run_with_torch() -> Iterator[Runner]:
    with runner(with_torch=True) as run:
        yield run


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where that is possible: thousands of fsyncs wait for a disk otherwise."""
    shm = Path("/dev/shm")
    if not is_in_memory(shm) or not os.access(shm, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir=shm) as name:
        yield Path(name)


@pytest.fixture(scope="module", params=VERBS)
def place(
    request: pytest.FixtureRequest, run_command: Runner, run_with_torch: Runner, memory: Path
) -> Place:
    verb = VERBS[request.param]
    if "spare" in verb.prepare and not is_in_memory(memory):
        pytest.skip("files are used again in memory alone")
    folder = memory / request.param.replace(" ", "-").replace(",", "")
    folder.mkdir()
    return Place(run_command if "argv" in verb.work else run_with_torch, verb, folder)


def sample(number: int, turn: int, most: int | None = MOST) -> Sequence[int]:
    """Of the calls 1 to `number`, `most` or all; another sample at each turn."""
    if most is None or number <= most:
        return range(1, number + 1)
    step = number / most
    return [1 + int((i + turn / len(FAULTS)) * step) for i in range(most)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_leaves_the_old_state_a_resumable_one_or_the_finished_one(
    place: Place, fault: str
) -> None:
    calls = FAULTS[fault]
    number = sum(place.counted.get(call, 0) for call in calls)
    for at in sample(number, turn=[*FAULTS].index(fault)):
        place.restore()
        answer = place.run(action=fault, at=at, calls=calls)
        where = f"{fault} at call {at}: {answer}"
        code = answer["code"]
        if fault == "kill" and answer["reached"]:
            assert code in (-9, 128 + 9), where
        elif fault == "term" and answer["reached"]:
            assert code in (143, -15, 128 + 9), where
        else:
            assert code in (0, 1, 3, 5), where
            assert "unexpected" not in answer["stderr"], where
            assert "Traceback" not in answer["stderr"], where
        is_finished = place.is_finished()
        assert is_finished or code != 0 or "left: policy-v00001: " in answer["stderr"], where
        place.check_inputs()
        place.check_nothing_half_written()
        place.check_again()


def test_all_is_synced_before_the_rename_and_its_name_after(place: Place) -> None:
    place.restore()
    recorded = place.run(action="record")["recorded"]
    finished = place.finished_paths()
    assert [*Course().follow(recorded, finished)] == []
    if any(call == "rename" and path in finished for call, _, path, *_ in recorded):
        without = [call for call in recorded if call[0] != "fsync"]
        assert [*Course().follow(without, finished)] != []


@pytest.mark.parametrize("action", ["short", "signals"])
def test_reads_and_writes_that_do_less_or_are_interrupted_change_nothing(
    place: Place, action: str
) -> None:
    place.restore()
    answer = place.run(action=action, calls=("read", "write"))
    assert answer["code"] == 0, answer
    assert contents(place.folder) == place.after


def test_of_two_on_one_target_one_wins_and_the_other_says_so(place: Place) -> None:
    if not place.finished_paths() or place.is_publisher:
        pytest.skip("it has no target, or is one process by design")
    number, ends = sum(place.counted.values()), set()
    for at in sample(number, turn=0, most=None if MOST is None else 4 * MOST):
        place.restore()
        answer = place.run(action="stop", at=at, calls=ALL, other=place.work())
        other = answer["other"]
        where = f"stopped at call {at}: {answer}"
        if other is None:  # threads took another course
            continue
        codes = (answer["code"], other["code"])
        ends.add(codes)
        # Of a batch, each of the two may win another adapter.
        assert 0 in codes or len(place.finished_paths()) > 1, where
        for one in (answer, other):
            assert one["code"] == 0 or any(words in one["stderr"] for words in REFUSED), where
            assert "Traceback" not in one["stderr"], where
        assert place.is_finished(), where
        place.check_inputs()
        place.check_again()
    assert ends
