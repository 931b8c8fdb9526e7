"""`lorashard verify`: findings as data, and an exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lorashard import SplitRequest, split_adapter
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


def test_what_is_not_proven_is_said(shards: Path, adapter: Path, tmp_path: Path) -> None:
    cast = tmp_path / "cast"
    split_adapter(adapter, cast, SplitRequest(ep_size=2, dtype="float32"))
    assert run_cli("verify", cast).stdout == (
        f"{cast}: ok, 4 experts on 2 ranks (values were cast: only --against proves which expert "
        "each one is of)\n"
    )
    for proven, argv in (
        (True, [shards]),
        (True, [shards, "--node-ranks", "0-1"]),
        (False, [shards, "--ep-rank", 0]),
        (False, [cast]),
        (True, [cast, "--against", adapter]),
    ):
        done = run_cli("verify", *argv, "--json")
        assert json.loads(done.stdout)["placement_proven"] is proven, argv
    flip_bit(shards / RANK_FILES[0], -2)
    assert json.loads(run_cli("verify", shards, "--json").stdout)["placement_proven"] is False


def test_a_directory_of_some_ranks_is_said_to_be_one(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "four"
    split_adapter(adapter, out, SplitRequest(ep_size=4))
    absent = [out / f"ep-0000{ep_rank}-of-00004.safetensors" for ep_rank in (0, 3)]
    for path in absent:
        path.unlink()
    done = run_cli("verify", out)
    assert done.returncode == 5
    assert done.stdout == "".join(f"{path}: No such file or directory.\n" for path in absent)
    assert done.stderr == (
        f"error: {out}: 2 of 4 rank files are not here (ep-00000-of-00004.safetensors, ...), only what ranks 1-2 need.\n"
        "  After a `pull` of these ranks that is right, and --node-ranks 1-2 verifies it. Otherwise "
        "copy the whole directory again.\n"
    )
    assert run_cli("verify", out, "--node-ranks", "1-2").returncode == 0
    (out / "ep-00001-of-00004.safetensors").unlink()
    assert "rank 2 needs" in (stderr := run_cli("verify", out).stderr)
    assert "and --ep-rank 2 verifies it" in stderr


def test_a_directory_of_some_ranks_that_is_damaged_is_said_to_be_that(shards: Path) -> None:
    (shards / RANK_FILES[1]).unlink()
    flip_bit(shards / RANK_FILES[0], -2)
    assert "Do not serve this directory" in run_cli("verify", shards).stderr


def test_several_directories_are_verified_in_one_call(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    flip_bit(damaged / RANK_FILES[0], -2)
    nowhere = tmp_path / "nowhere"
    done = run_cli("verify", nowhere, damaged, shards)
    assert done.returncode == run_cli("verify", nowhere).returncode
    assert done.stdout == (
        f"{damaged / RANK_FILES[0]}: BLAKE3 differs from the manifest's\n"
        f"{shards}: ok, 4 experts on 2 ranks\n"
    )
    assert done.stderr.count("error: ") == 3
    assert "error: 2 of 3 paths failed.\n" in done.stderr
    found = json.loads(run_cli("verify", nowhere, damaged, shards, "--json").stdout)
    assert [document["shards"] for document in found] == [str(nowhere), str(damaged), str(shards)]
    assert [document.get("ok") for document in found] == [None, False, True]
    assert found[0]["exit_code"] == done.returncode
    assert run_cli("verify", shards, shards).returncode == 0
