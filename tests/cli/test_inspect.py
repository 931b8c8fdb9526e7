"""`lorashard inspect`: what an adapter or a shard directory holds."""

from __future__ import annotations

import json
from pathlib import Path

from lorashard import inspect_path
from tests.adapters import Spec, build
from tests.goldens import check_golden
from tests.tiny import RANK_FILES, change_version, run_cli, save_fused


def test_inspect_of_an_adapter_is_an_interface(adapter: Path, tmp_path: Path) -> None:
    check_golden("inspect_adapter", run_cli("inspect", adapter, "--json").stdout, tmp_path)


def test_inspect_of_a_fused_adapter_is_an_interface(tmp_path: Path) -> None:
    adapter = save_fused(tmp_path / "adapter")
    check_golden("inspect_fused", run_cli("inspect", adapter, "--json").stdout, tmp_path)


def test_inspect_says_that_experts_are_counted_from_r(tmp_path: Path) -> None:
    adapter = save_fused(tmp_path / "adapter")
    counted = "4 in 1 modules (counted from r; --model checks it)"
    assert counted in run_cli("inspect", adapter).stdout
    assert "counted" not in run_cli("inspect", adapter, "--num-experts", 4).stdout


def test_inspect_of_shards_is_an_interface(shards: Path, tmp_path: Path) -> None:
    check_golden("inspect_shards", run_cli("inspect", shards, "--json").stdout, tmp_path)


def test_what_is_said_of_a_few_of_many_experts_is_an_interface(tmp_path: Path) -> None:
    trained = (0, *range(50, 90), 127)
    spec = Spec("L1", num_experts=128, experts=trained, lora_ranks={60: 1, 127: 3}, extras=True)
    adapter, shards = build(spec).write(tmp_path / "adapter"), tmp_path / "shards"
    of_adapter = run_cli("inspect", adapter, "--num-experts", 128, "--json")
    check_golden("inspect_few_experts", of_adapter.stdout, tmp_path)
    split = run_cli("split", adapter, "--num-experts", 128, "--ep-size", 3, "-o", shards, "--json")
    check_golden("split_few_experts", split.stdout, tmp_path)
    of_shards = run_cli("inspect", shards, "--json")
    check_golden("inspect_few_experts_shards", of_shards.stdout, tmp_path)


def test_inspect_shows_the_module_and_its_experts(adapter: Path) -> None:
    done = run_cli("inspect", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("model.layers.0.mlp.experts", "4 in 1 modules", "per_expert", "r=2, alpha=4"):
        assert shown in done.stdout


def test_inspect_shows_the_files_of_each_rank(shards: Path) -> None:
    done = run_cli("inspect", shards)
    assert done.returncode == 0
    assert all(name in done.stdout for name in (*RANK_FILES, "linear on 2 ranks", "2-3"))


def test_a_manifest_that_was_changed_is_a_warning(shards: Path, tmp_path: Path) -> None:
    assert not inspect_path(shards)["manifest_changed"]
    change_version(shards)
    assert inspect_path(shards)["manifest_changed"]
    assert inspect_path(shards.as_uri())["manifest_changed"]
    done = run_cli("inspect", shards, "--html", tmp_path / "page.html")
    assert done.returncode == 0
    assert "warning: lorashard.json: it was changed since it was written" in done.stderr
    assert "lorashard.json: it was changed since" in (tmp_path / "page.html").read_text()


def test_several_paths_are_inspected_in_one_call(
    adapter: Path, shards: Path, tmp_path: Path
) -> None:
    done = run_cli("inspect", adapter, tmp_path / "nowhere", shards)
    assert done.returncode == 3
    assert f"adapter       {adapter}\n" in done.stdout
    assert f"\n\nshards      {shards}\n" in done.stdout
    assert "error: 1 of 3 paths failed.\n" in done.stderr
    found = json.loads(run_cli("inspect", adapter, shards, "--json").stdout)
    assert [document["kind"] for document in found] == ["adapter", "shards"]
