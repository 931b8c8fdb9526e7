"""The programs of a GPU host in stages: what each is given, its limit, and what it leaves behind."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import pytest

from tests.gpu.stages import Program, packing, read_plan, run_stages

# Says what it was given, leaves a process in a session of its own, and goes on for some seconds.
PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
import packages_of_all
work, out, seconds = sys.argv[2], Path(sys.argv[4]), float(sys.argv[5])
seconds = float(os.environ.get("SECONDS_INSTEAD", seconds))
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
out.write_text(json.dumps({"work": work, "left": left.pid, "release": packages_of_all.RELEASE}))
time.sleep(seconds)
"""


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for release in ("1.0", "2.0"):
        folder = tmp_path / "sites" / release
        folder.mkdir(parents=True)
        (folder / "program.py").write_text(PROGRAM)
        (folder / "release.py").write_text(f"RELEASE = {release!r}")
    (tmp_path / "sites" / "common").mkdir()
    (tmp_path / "sites" / "common" / "packages_of_all.py").write_text("from release import RELEASE")
    return tmp_path / "sites"


def test_a_plan_is_read() -> None:
    assert read_plan(
        "# a comment\na 10 1.0 A=1 B=x=y tests.x --only 'b c' --c=d\n# another\nb 20.5 1.0 tests.y\n\n\nc 1 2.0 z # why\n"
    ) == [
        [
            Program(
                "a", 10.0, "1.0", ("tests.x", "--only", "b c", "--c=d"), (("A", "1"), ("B", "x=y"))
            ),
            Program("b", 20.5, "1.0", ("tests.y",)),
        ],
        [Program("c", 1.0, "2.0", ("z",))],
    ]


@pytest.mark.parametrize(
    "text", ["a 10 1.0", "a ten 1.0 x", "a 1 1.0 x\n\na 1 1.0 y", "a 1 1.0 A=1"]
)
def test_a_line_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME|ten|twice"):
        read_plan(text)


def test_programs_run_in_stages_and_leave_nothing(tmp_path: Path, sites: Path) -> None:
    plan = "a 30 1.0 SECONDS_INSTEAD=0 program 60\nslow 1 2.0 program 60\n\nb 30 2.0 program 0"
    began = time.monotonic()
    said = run_stages(read_plan(plan), sites, Path("/w"), tmp_path, 60)
    assert time.monotonic() - began < 30
    assert said["a"].startswith("exit status 0")
    assert said["slow"].startswith("no end after")
    assert said["b"].startswith("exit status 0")
    told = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in said}
    assert {one["work"] for one in told.values()} == {"/w"}
    assert {name: one["release"] for name, one in told.items()} == {
        "a": "1.0", "slow": "2.0", "b": "2.0",
    }  # fmt: skip
    assert not [one["left"] for one in told.values() if is_running(one["left"])]


def test_a_program_without_time_is_not_started(tmp_path: Path, sites: Path) -> None:
    assert run_stages(read_plan("a 30 1.0 program 0"), sites, Path("/w"), tmp_path, 5) == {
        "a": "not started: no time is left"
    }
    assert not (tmp_path / "a.json").exists()


def test_what_is_there_can_be_had_before_the_end(tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "all.tgz"
    (out / "cache").mkdir(parents=True)
    for name in ("a.json", "b.log", "model.safetensors", "cache/c.json"):
        (out / name).write_text(name)

    def names() -> set[str]:
        with tarfile.open(packed) as archive:
            return {Path(entry.name).name for entry in archive}

    with packing(packed, out, tmp_path / "none", every_s=0.05):
        ends = time.monotonic() + 30
        while not packed.exists() and time.monotonic() < ends:
            time.sleep(0.01)
        assert names() == {"a.json", "b.log"}
        (out / "last.jsonl").write_text("{}")
    assert names() == {"a.json", "b.log", "last.jsonl"}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
