"""`lorashard reshard` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import contents, run_cli


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
