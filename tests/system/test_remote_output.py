"""Output to a URL is refused by every command and function, and leaves no folder of its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashard import (
    SplitRequest,
    convert_shards,
    merge_shards,
    pull_shards,
    reshard_shards,
    split_adapter,
    split_adapters,
)
from lorashard.errors import LorashardError, ShardError
from tests.tiny import save_adapter

REQUEST = SplitRequest(ep_size=2)
URL = "s3://bucket/x"


def split_many(adapter: Path) -> None:
    (outcome,) = split_adapters([adapter], URL, REQUEST)
    if outcome.error is not None:
        raise outcome.error


@pytest.mark.parametrize(
    "write",
    [
        lambda adapter, _: split_adapter(adapter, URL, REQUEST),
        lambda adapter, _: split_adapter(adapter, URL, REQUEST, resume=True, force=True),
        lambda adapter, _: split_many(adapter),
        lambda _, shards: merge_shards(shards, URL),
        lambda _, shards: reshard_shards(shards, URL, 4),
        lambda _, shards: convert_shards(shards, URL, "fused"),
        lambda _, shards: pull_shards(shards, URL, [0]),
    ],
    ids=["split", "resume", "batch", "merge", "reshard", "convert", "pull"],
)
def test_output_to_a_url_is_refused(
    write: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "shards", REQUEST)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        LorashardError, match=r"s3://bucket/x.*: output goes .* this is a URL"
    ) as raised:
        write(adapter, tmp_path / "shards")
    assert isinstance(raised.value, ShardError)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "shards"]
