"""A directory with some ranks' files is known as one, wherever all of them are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashard import (
    SplitRequest,
    convert_shards,
    merge_shards,
    pull_shards,
    push_shards,
    reshard_shards,
    split_adapter,
    verify_shards,
)
from lorashard.errors import PartialShardsError, ShardError
from lorashard.shards.directory import read_manifest
from lorashard.shards.held import find_held_ranks, find_partial
from tests.tiny import run_cli, save_adapter


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "whole", SplitRequest(4))
    return tmp_path / "whole"


@pytest.fixture
def partial(tmp_path: Path, whole: Path) -> Path:
    pull_shards(whole, tmp_path / "partial", [1, 2])
    return tmp_path / "partial"


def test_the_ranks_that_are_here(whole: Path, partial: Path) -> None:
    manifest = read_manifest(whole)
    assert find_held_ranks(manifest, whole) == (0, 1, 2, 3)
    assert find_held_ranks(manifest, partial) == (1, 2)
    assert find_partial(manifest, whole) is None


@pytest.mark.parametrize(
    ("ep_ranks", "said"),
    [
        (
            (1, 2),
            "2 of 4 rank files are not here (ep-00000-of-00004.safetensors, ...), only what ranks 1-2 need.",
        ),
        (
            (0, 1, 3),
            "1 of 4 rank files is not here (ep-00002-of-00004.safetensors), only what ranks 0, 1, 3 need.",
        ),
        (
            (3,),
            "3 of 4 rank files are not here (ep-00000-of-00004.safetensors, ...), only what rank 3 needs.",
        ),
    ],
)
def test_what_is_not_here_is_said(
    whole: Path, tmp_path: Path, ep_ranks: tuple[int, ...], said: str
) -> None:
    manifest = pull_shards(whole, tmp_path / "out", ep_ranks)
    error = find_partial(manifest, tmp_path / "out")
    assert error is not None
    assert error.message == f"{tmp_path}/out: {said}"


@pytest.mark.parametrize("verb", ["merge", "convert", "reshard", "push"])
def test_what_needs_all_ranks_says_that_some_are_not_here(
    partial: Path, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PartialShardsError, match="only what ranks 1-2 need"):
        {
            "merge": lambda: merge_shards(partial, out),
            "convert": lambda: convert_shards(partial, out, "fused"),
            "reshard": lambda: reshard_shards(partial, out, 2),
            "push": lambda: push_shards(partial, out.as_uri()),
        }[verb]()
    assert not out.exists()
    assert verify_shards(partial, ep_ranks=[1, 2]) == ()


def test_a_directory_without_any_rank_file_is_damaged(partial: Path, tmp_path: Path) -> None:
    for file in partial.glob("ep-*"):
        file.unlink()
    assert find_partial(read_manifest(partial), partial) is None
    with pytest.raises(ShardError, match="No such file") as caught:
        merge_shards(partial, tmp_path / "out")
    assert not isinstance(caught.value, PartialShardsError)


def test_inspect_marks_what_is_not_here(partial: Path) -> None:
    rows = [line for line in run_cli("inspect", partial).stdout.splitlines() if "ep-0" in line]
    assert [line.endswith(", not here") for line in rows] == [True, False, False, True]
    assert json.loads(run_cli("inspect", partial, "--json").stdout)["held_ranks"] == [1, 2]
    there = json.loads(run_cli("inspect", partial.as_uri(), "--json").stdout)
    assert there["held_ranks"] is None
