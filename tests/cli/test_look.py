"""`inspect`, `plan` and `verify`: data on stdout, in a form that scripts can rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.goldens import check_golden
from tests.tiny import RANK_FILES, contents, flip_bit, run_cli, save_adapter, save_fused

ESCAPE = "\x1b"


def test_inspect_of_an_adapter_is_an_interface(adapter: Path, tmp_path: Path) -> None:
    check_golden("inspect_adapter", run_cli("inspect", adapter, "--json").stdout, tmp_path)


def test_inspect_of_a_fused_adapter_is_an_interface(tmp_path: Path) -> None:
    adapter = save_fused(tmp_path / "adapter")
    check_golden("inspect_fused", run_cli("inspect", adapter, "--json").stdout, tmp_path)


def test_inspect_of_shards_is_an_interface(shards: Path, tmp_path: Path) -> None:
    check_golden("inspect_shards", run_cli("inspect", shards, "--json").stdout, tmp_path)


def test_plan_is_an_interface(adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    done = run_cli("plan", adapter, "--ep-size", 3, "--max-loras", 2, "--json")
    check_golden("plan", done.stdout, tmp_path)
    assert contents(tmp_path) == before


def test_verify_is_an_interface(shards: Path, adapter: Path, tmp_path: Path) -> None:
    done = run_cli("verify", shards, "--against", adapter, "--json")
    check_golden("verify", done.stdout, tmp_path)
    flip_bit(shards / RANK_FILES[0], -2)
    done = run_cli("verify", shards, "--json")
    assert done.returncode == 5
    check_golden("verify_faults", done.stdout, tmp_path)


def test_inspect_shows_the_module_and_its_experts(adapter: Path) -> None:
    done = run_cli("inspect", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("model.layers.0.mlp.experts", "4 in 1 modules", "per_expert", "r=2, alpha=4"):
        assert shown in done.stdout


def test_inspect_shows_the_files_of_each_rank(shards: Path) -> None:
    done = run_cli("inspect", shards)
    assert done.returncode == 0
    assert all(name in done.stdout for name in (*RANK_FILES, "linear on 2 ranks", "2-3"))


def test_plan_shows_a_row_for_each_rank(adapter: Path) -> None:
    done = run_cli("plan", adapter, "--ep-size", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:3] for line in done.stdout.splitlines()[2:4]] == [
        ["0", "2", "0-1"],
        ["1", "2", "2-3"],
    ]


def test_findings_are_data_and_give_exit_code_5(shards: Path) -> None:
    for name in RANK_FILES:
        flip_bit(shards / name, -2)
    done = run_cli("verify", shards)
    assert done.returncode == 5
    assert done.stdout == "".join(
        f"{shards / name}: BLAKE3 differs from the manifest's\n" for name in RANK_FILES
    )
    assert "2 things are wrong" in done.stderr


def test_a_sound_directory_is_said_to_be_one(shards: Path, adapter: Path) -> None:
    done = run_cli("verify", shards)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"{shards}: ok, 4 experts on 2 ranks\n", "",
    )  # fmt: skip
    assert "every value equal to" in run_cli("verify", shards, "--against", adapter).stdout
    assert run_cli("verify", shards, "-q").stdout == ""


def test_exit_codes_name_what_cannot_be_looked_at(adapter: Path, shards: Path) -> None:
    assert run_cli("inspect", adapter.parent / "nowhere").returncode == 3
    assert run_cli("verify", adapter).returncode == 5
    assert run_cli("verify", shards, "--against", shards).returncode == 3
    assert run_cli("plan", adapter).returncode == 2
    (shards / "lorashard.json").write_text("{")
    assert run_cli("inspect", shards).returncode == 5


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
def test_nothing_is_coloured_without_a_terminal(
    adapter: Path, shards: Path, environment: dict[str, str]
) -> None:
    for command in (
        ["inspect", adapter], ["inspect", shards], ["plan", adapter, "--ep-size", 2],
        ["verify", shards], ["verify", adapter], ["split", "--help"], ["split", "--nonsense"],
    ):  # fmt: skip
        done = run_cli(*command, **environment)
        assert ESCAPE not in done.stdout + done.stderr, command


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
