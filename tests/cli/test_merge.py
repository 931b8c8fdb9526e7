"""`lorashard merge` as a user runs it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.goldens import check_golden
from tests.tiny import contents, run_cli, save_pickled


def test_merge_gives_the_source_back(adapter: Path, tmp_path: Path) -> None:
    run_cli("split", adapter, "--ep-size", 2)
    done = run_cli("merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/merged\n")
    assert contents(tmp_path / "merged") == contents(adapter)
    again = run_cli("merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged")
    assert again.returncode == 5
    forced = ["merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged", "--force", "--json"]
    check_golden("merge", run_cli(*forced).stdout, tmp_path)


def test_merge_never_replaces_shards(adapter: Path, tmp_path: Path) -> None:
    run_cli("split", adapter, "--ep-size", 2)
    shards = tmp_path / "adapter-ep2"
    before = contents(shards)
    assert run_cli("merge", shards, "-o", shards, "--force").returncode == 5
    assert contents(shards) == before


def test_merge_of_a_pickle_says_what_it_gives(tmp_path: Path) -> None:
    run_cli("split", save_pickled(tmp_path / "adapter"), "--ep-size", 2, "--allow-pickle")
    done = run_cli("merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged")
    assert "the source was a pickle" in done.stderr


def test_merge_of_cast_shards_is_refused(adapter: Path, tmp_path: Path) -> None:
    run_cli("split", adapter, "--ep-size", 2, "--dtype", "float32")
    done = run_cli("merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged")
    assert done.returncode == 5
    assert "were cast to F32" in done.stderr


def test_merge_names_the_file_that_is_cut_off(adapter: Path, tmp_path: Path) -> None:
    run_cli("split", adapter, "--ep-size", 2)
    rank_0 = tmp_path / "adapter-ep2" / "ep-00000-of-00002.safetensors"
    os.truncate(rank_0, rank_0.stat().st_size - 10)
    done = run_cli("merge", tmp_path / "adapter-ep2", "-o", tmp_path / "merged")
    assert done.returncode == 5
    assert rank_0.name in done.stderr
