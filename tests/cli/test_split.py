"""`lorashard split` as a user runs it: files, streams, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorashard import verify_shards
from tests.goldens import check_golden
from tests.tiny import (
    contents,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_config,
    save_fused,
    save_pickled,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


def test_the_target_stands_beside_the_adapter_by_default(adapter: Path) -> None:
    done = run_cli("split", adapter, "--ep-size", 2)
    target = adapter.with_name("adapter-ep2")
    assert (done.returncode, done.stdout) == (0, f"{target}\n")
    assert done.stderr.startswith(f"{adapter}: 4 experts")
    assert verify_shards(target, against=adapter) == ()


def test_split_says_that_experts_are_counted_from_r(tmp_path: Path) -> None:
    adapter = save_fused(tmp_path / "adapter")
    done = run_cli("split", adapter, "--ep-size", 2, "--dry-run")
    assert f"{adapter}: 4 experts (counted from r; --model checks it) in 1 modules" in done.stderr
    done = run_cli("split", adapter, "--ep-size", 2, "--dry-run", "--num-experts", 4)
    assert f"{adapter}: 4 experts in 1 modules" in done.stderr


def test_o_names_the_target(adapter: Path, tmp_path: Path) -> None:
    done = run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "new" / "shards")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/new/shards\n")
    assert (tmp_path / "new" / "shards" / "lorashard.json").exists()


def test_several_adapters_go_into_one_folder(adapter: Path, tmp_path: Path) -> None:
    fused = save_fused(tmp_path / "fused")
    done = run_cli("split", adapter, fused, "--ep-size", 2, "-o", tmp_path / "all", "--json")
    assert done.returncode == 0
    assert sorted(os.listdir(tmp_path / "all")) == ["adapter-ep2", "fused-ep2"]
    check_golden("split_several", done.stdout, tmp_path)


def test_two_adapters_of_one_name_collide_before_anything_is_written(tmp_path: Path) -> None:
    one, two = save_adapter(tmp_path / "1" / "same"), save_adapter(tmp_path / "2" / "same")
    done = run_cli("split", one, two, "--ep-size", 2, "-o", tmp_path / "all")
    assert done.returncode == 5
    assert "would both be written to" in done.stderr
    assert not (tmp_path / "all").exists()


def test_what_was_written_before_an_error_is_told(adapter: Path, tmp_path: Path) -> None:
    done = run_cli("split", adapter, tmp_path / "nowhere", "--ep-size", 2)
    assert done.returncode == 3
    assert done.stdout == f"{tmp_path}/adapter-ep2\n"


def test_a_dry_run_says_the_same_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    dry = run_cli("split", adapter, "--ep-size", 2, "--dry-run", "--json")
    assert "dry run, nothing written" in dry.stderr
    assert contents(tmp_path) == before
    wet = run_cli("split", adapter, "--ep-size", 2, "--json")
    assert json.loads(dry.stdout) == json.loads(wet.stdout) | {"dry_run": True}


def test_json_is_an_interface(adapter: Path, tmp_path: Path) -> None:
    done = run_cli("split", adapter, "--ep-size", 3, "--placement", "round_robin", "--json")
    check_golden("split", done.stdout, tmp_path)


def test_quiet_prints_nothing(adapter: Path) -> None:
    done = run_cli("split", adapter, "--ep-size", 9, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quiet_still_prints_errors(tmp_path: Path) -> None:
    done = run_cli("split", tmp_path / "nowhere", "--ep-size", 2, "-q")
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere does not exist.\n")


def test_notes_are_talk_and_stand_in_json_too(adapter: Path) -> None:
    done = run_cli("split", adapter, "--ep-size", 9, "--json")
    assert done.stderr.startswith("note: 5 of 9 ranks hold no expert.\n")
    assert json.loads(done.stdout)["notes"] == ["5 of 9 ranks hold no expert."]


def test_force_replaces(adapter: Path) -> None:
    target = adapter.with_name("adapter-ep2")
    assert run_cli("split", adapter, "--ep-size", 2).returncode == 0
    save_adapter(adapter, per_expert_tensors(seed=1))
    again = run_cli("split", adapter, "--ep-size", 2)
    assert (again.returncode, again.stdout) == (5, "")
    assert "--force replaces it" in again.stderr
    assert run_cli("split", adapter, "--ep-size", 2, "--force").returncode == 0
    assert verify_shards(target, against=adapter) == ()


def test_the_adapter_itself_is_never_the_target(adapter: Path) -> None:
    before = contents(adapter)
    assert run_cli("split", adapter, "--ep-size", 2, "-o", adapter, "--force").returncode == 5
    assert contents(adapter) == before


def test_an_expert_map_file_places_experts(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"ranks": [[3, 0], [1, 2, 3]]}')
    done = run_cli(
        "split", adapter, "--ep-size", 2, "--expert-map", tmp_path / "map.json", "--json"
    )
    assert json.loads(done.stdout)["ranks"] == [[3, 0], [1, 2, 3]]
    assert verify_shards(tmp_path / "adapter-ep2", against=adapter) == ()


def test_a_pickle_is_read_on_demand_only(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    assert run_cli("split", adapter, "--ep-size", 2).returncode == 3
    assert run_cli("split", adapter, "--ep-size", 2, "--allow-pickle").returncode == 0


def test_exit_codes_name_the_kind_of_error(adapter: Path, tmp_path: Path) -> None:
    save_config(tmp_path / "empty")
    (tmp_path / "map.json").write_text("[[0, 1]]")
    (tmp_path / "taken").write_text("")
    codes = {
        ("--ep-size", "x"): 2,
        ("--ep-size", "0"): 2,
        (): 2,
        ("--ep-size", "2", "--expert-map", tmp_path / "map.json"): 4,
        ("--ep-size", "2", "--expert-map", "nowhere.json"): 3,
        ("--ep-size", "2", "-o", tmp_path / "taken"): 5,
    }
    for options, code in codes.items():
        done = run_cli("split", adapter, *options)
        assert (done.returncode, done.stdout) == (code, ""), options
        assert "Traceback" not in done.stderr
    assert run_cli("split", tmp_path / "empty", "--ep-size", 2).returncode == 3
