"""`lorashard reshard` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from tests.tiny import contents, mounted_tmpfs, per_expert_tensors, run_cli, save_adapter


def test_the_target_is_beside_the_shards_and_named_after_the_new_size(shards: Path) -> None:
    done = run_cli("reshard", shards, "--ep-size", 4)
    assert (done.returncode, done.stdout) == (0, f"{shards.with_name('adapter-ep4')}\n")
    assert "4 experts in 1 modules on 4 ranks" in done.stderr


def test_of_a_url_the_target_is_in_the_current_directory(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = run_cli("reshard", shards.as_uri(), "--ep-size", 4)
    assert (done.returncode, done.stdout) == (0, "adapter-ep4\n")
    assert (tmp_path / "here" / "adapter-ep4" / "lorashard.json").exists()


def test_json_describes_the_new_directory(shards: Path, tmp_path: Path) -> None:
    options = ("--ep-size", 3, "--placement", "round_robin", "-o", tmp_path / "out", "--json", "-q")
    done = run_cli("reshard", shards, *options)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["ranks"] == [[0, 3], [1], [2]]
    assert (result["shards"], result["revision"]) == (str(shards), None)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes.pop("adapter_model.safetensors") > 0  # the notice has nothing of the adapter
    assert result["files"] == sizes


def test_two_placements_are_refused(shards: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    done = run_cli(
        "reshard", shards, "--ep-size", 2, "--placement", "round_robin", "--expert-map", "map.json"
    )
    assert done.returncode == 4
    assert "both say where experts go" in done.stderr
    assert contents(tmp_path) == before


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    shards: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    argv = ("reshard", shards, "--ep-size", 3, "-o", tmp_path / "out", "--json")
    planned = run_cli(*argv, "--dry-run")
    assert planned.stderr.endswith(" per rank (dry run, nothing written)\n")
    assert contents(tmp_path) == before
    done = json.loads(run_cli(*argv).stdout)
    assert json.loads(planned.stdout) == done | {"dry_run": True}
    assert run_cli(*argv, "--dry-run").returncode == 5, "the target is there now"


def test_shards_that_do_not_fit_are_refused_with_both_figures(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", per_expert_tensors(0, 4096))
    split_adapter(adapter, tmp_path / "large", SplitRequest(ep_size=2))
    with mounted_tmpfs(tmp_path / "disk", "size=160k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        disk = tmp_path / "disk"
        for argv in ((), ("--dry-run",)):
            done = run_cli("reshard", tmp_path / "large", "--ep-size", 4, "-o", disk / "out", *argv)
            assert done.returncode == 5
            assert f" MB are to be written, and {disk} has 0.16 MB free." in done.stderr
            assert not any(disk.iterdir())
