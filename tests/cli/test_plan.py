"""`lorashard plan`: what a split would give each rank, without writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.goldens import check_golden
from tests.tiny import contents, run_cli, save_adapter, save_fused


def test_plan_is_an_interface(adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    done = run_cli("plan", adapter, "--ep-size", 3, "--max-loras", 2, "--json")
    check_golden("plan", done.stdout, tmp_path)
    assert contents(tmp_path) == before


def test_plan_shows_a_row_for_each_rank(adapter: Path) -> None:
    done = run_cli("plan", adapter, "--ep-size", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:3] for line in done.stdout.splitlines()[2:4]] == [
        ["0", "2", "0-1"],
        ["1", "2", "2-3"],
    ]


def test_plan_says_that_experts_are_counted_from_r(tmp_path: Path) -> None:
    adapter = save_fused(tmp_path / "adapter")
    done = run_cli("plan", adapter, "--ep-size", 2)
    assert "4 experts (counted from r; --model checks it), linear on" in done.stdout
    assert "counted" not in run_cli("plan", adapter, "--ep-size", 2, "--num-experts", 4).stdout


@pytest.mark.parametrize("name", ["a[/b]c", "a[bold]c", "a:smile:c"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    adapter = save_adapter(tmp_path / name)
    done = run_cli("plan", adapter, "--ep-size", 2)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


def test_a_terminal_without_unicode_gets_a_plan(adapter: Path) -> None:
    done = run_cli("plan", adapter, "--ep-size", 2, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "at least" in done.stdout
    assert "\\u" not in done.stdout, "nothing in it had to be escaped"


def test_json_is_ascii_safe_to_pipe(adapter: Path) -> None:
    done = run_cli("plan", adapter, "--ep-size", 2, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["ep_size"] == 2
