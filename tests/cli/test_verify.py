"""`lorashard verify`: findings as data, and an exit code."""

from __future__ import annotations

from pathlib import Path

from tests.goldens import check_golden
from tests.tiny import RANK_FILES, flip_bit, run_cli


def test_verify_is_an_interface(shards: Path, adapter: Path, tmp_path: Path) -> None:
    done = run_cli("verify", shards, "--against", adapter, "--json")
    check_golden("verify", done.stdout, tmp_path)
    flip_bit(shards / RANK_FILES[0], -2)
    done = run_cli("verify", shards, "--json")
    assert done.returncode == 5
    check_golden("verify_faults", done.stdout, tmp_path)


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
