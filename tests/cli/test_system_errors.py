"""What the operating system refuses is told with its place and a way out, not as unexpected."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import ShardError
from lorashard.storage.system_errors import better_hint, describe
from tests.tiny import RANK_FILES, REPO, save_adapter

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, capability.h


def obey_permissions() -> None:
    """Let root, too, be refused what a file's mode forbids. Of others, nothing is taken."""
    if os.geteuid() == 0:
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            assert ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


def run(folder: Path, *argv: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "lorashard", *map(str, argv)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)}, preexec_fn=obey_permissions,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = save_adapter(tmp_path / "a")
    split_adapter(adapter, tmp_path / "s", SplitRequest(ep_size=2))
    return tmp_path


@pytest.mark.parametrize(
    ("closed", "mode", "argv"),
    [
        ("a/adapter_model.safetensors", 0, ["split", "a", "--ep-size", 2, "-o", "o"]),
        ("a/adapter_config.json", 0, ["inspect", "a"]),
        ("a", 0o600, ["split", "a", "--ep-size", 2, "-o", "o"]),
        ("a", 0o600, ["plan", "a", "--ep-size", 2]),
        ("a/adapter_model.safetensors", 0, ["verify", "s", "--against", "a"]),
        ("s", 0o600, ["verify", "s"]),
        ("s", 0o300, ["verify", "s"]),
        ("s/lorashard.json", 0, ["inspect", "s"]),
        ("s/lorashard.json", 0, ["merge", "s", "-o", "o"]),
        (f"s/{RANK_FILES[0]}", 0, ["merge", "s", "-o", "o"]),
        (f"s/{RANK_FILES[0]}", 0, ["pull", "s", "--ep-rank", 0, "-o", "o"]),
    ],
)
def test_what_may_not_be_read_is_told_with_its_place(
    folder: Path, closed: str, mode: int, argv: list[Any]
) -> None:
    place, before = folder / closed, (folder / closed).stat().st_mode
    place.chmod(mode)
    try:
        code, told = run(folder, *argv)
    finally:
        place.chmod(before)
    assert code in (3, 5)
    assert closed in told
    assert "Permission denied" in told
    assert "Check the permissions" in told
    assert "unexpected" not in told
    assert not (folder / "o").exists()


def test_one_adapter_of_a_batch_has_the_hint_that_it_has_alone(folder: Path) -> None:
    save_adapter(folder / "b")
    (folder / "a" / "adapter_model.safetensors").chmod(0)
    _, alone = run(folder, "split", "a", "--ep-size", 2, "-o", "o")
    code, told = run(folder, "split", "a", "b", "--ep-size", 2, "-o", "many")
    assert code == 3
    assert "\n  Check the permissions of the file" in alone
    assert alone in told
    done = subprocess.run(
        [sys.executable, "-m", "lorashard", "split", "a", "b", "--ep-size=2", "-omost", "--json"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)}, preexec_fn=obey_permissions,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)[0]["hint"] in alone


def test_what_cannot_be_written_is_told_with_its_place(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)
    code, told = run(folder, "split", "a", "--ep-size", 2, "-o", "closed/o")
    assert code == 5
    assert "closed/o: cannot be written (Permission denied)" in told


def test_a_link_that_leads_to_itself_is_told(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    code, told = run(folder, "split", "loop", "--ep-size", 2, "-o", "o")
    assert code == 3
    assert "unexpected" not in told


def test_only_what_files_have_to_do_with_is_described() -> None:
    error = OSError(errno.EMFILE, "words", "some/file")
    message, hint = describe(error) or ("", "")
    assert message == "some/file: Too many open files."
    assert "ulimit -n" in hint
    assert describe(OSError(errno.ECONNRESET, "words")) is None
    assert describe(OSError("no number")) is None


@pytest.mark.parametrize(
    ("number", "part"),
    [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "permissions"), (errno.ENOENT, None)],
)
def test_the_hint_follows_from_the_cause(number: int, part: str | None) -> None:
    error = ShardError("x: cannot be written.", hint="Choose another place with -o.")
    assert better_hint(error) is None
    error.__cause__ = OSError(number, os.strerror(number))
    hint = better_hint(error)
    assert hint is None if part is None else part in (hint or "")


def to(folder: Path, command: str) -> tuple[int, str]:
    """Run a shell line in which L is lorashard; the exit code of lorashard, and its stderr."""
    program = f'L() {{ "{sys.executable}" -m lorashard "$@"; }}; set -o pipefail; {command}'
    done = subprocess.run(
        ["bash", "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_reader_that_goes_away_changes_no_exit_code(folder: Path) -> None:
    assert to(folder, "L inspect s | head -n 0") == (0, "")
    (folder / "s" / RANK_FILES[0]).write_bytes(b"short")
    code, told = to(folder, "L verify s | head -n 0")
    assert code == 5
    assert told.startswith("error: s:")


def test_a_full_disk_under_stdout_is_told_and_what_was_split_stays(folder: Path) -> None:
    for options in ("", "--json"):
        code, told = to(folder, f"L split a --ep-size 2 -o out{options} {options} > /dev/full")
        assert code == 1
        assert "error: The output cannot be written (No space left on device)." in told
        assert "Traceback" not in told
        assert (folder / f"out{options}" / "lorashard.json").exists()


def test_closed_streams_do_no_harm(folder: Path) -> None:
    assert to(folder, "L split a --ep-size 2 -o out >&- 2>&-")[0] == 0


def test_a_current_folder_that_is_gone_is_told(folder: Path) -> None:
    (folder / "gone").mkdir()
    code, told = to(folder, "cd gone && rmdir ../gone && L split ../a --ep-size 2 -o x")
    assert code == 3
    assert "The current folder does not exist any more." in told


def test_a_line_of_a_list_that_is_no_name_fails_alone(folder: Path) -> None:
    (folder / "list").write_bytes(b"a\nq\0b\n" + b"z" * 5000 + b"\n")
    code, told = to(folder, "L split --from list --ep-size 2 -o out")
    assert code == 3
    assert "unexpected" not in told
    assert (folder / "out" / "a-ep2" / "lorashard.json").exists()
