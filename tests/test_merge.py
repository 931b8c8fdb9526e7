"""Shards -> the source adapter, bit for bit, or a refusal that leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorashard import SplitRequest, merge_shards, split_adapter
from lorashard.errors import LorashardError, ManifestError, ShardError, VerificationError
from tests.adapters import LAYOUTS, Spec, build
from tests.tiny import MODULE, RANK_FILES, contents, flip_bit, save_adapter, save_fused

FILES = ("replicated.safetensors", *RANK_FILES)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def refused(shards: Path, kind: type[LorashardError]) -> str:
    """The message of a merge that is refused and leaves no trace."""
    target = shards.with_name("merged")
    with pytest.raises(kind) as caught:
        merge_shards(shards, target)
    assert not [path.name for path in shards.parent.iterdir() if "merged" in path.name]
    return caught.value.message


@pytest.mark.parametrize("save", [save_adapter, save_fused])
@pytest.mark.parametrize("ep_size", [1, 3, 9])
def test_the_source_comes_back(tmp_path: Path, save: Callable[[Path], Path], ep_size: int) -> None:
    adapter = save(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "out", SplitRequest(ep_size=ep_size))
    merge_shards(tmp_path / "out", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not build(Spec(name)).options])
def test_every_layout_comes_back(tmp_path: Path, layout: str) -> None:
    adapter = build(Spec(layout, extras=True)).write(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "out", SplitRequest(ep_size=2))
    merge_shards(tmp_path / "out", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)


def test_a_url_is_merged_like_a_directory(shards: Path, tmp_path: Path) -> None:
    manifest = merge_shards(shards.as_uri(), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "adapter")
    assert manifest.placement.ep_size == 2


def test_progress_adds_up_to_the_data_of_the_source(shards: Path, tmp_path: Path) -> None:
    done: list[int] = []
    merge_shards(shards, tmp_path / "merged", progress=done.append)
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert sum(done) == len(weights) - 8 - int.from_bytes(weights[:8], "little")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_data_of_any_file_is_refused(shards: Path, name: str) -> None:
    flip_bit(shards / name, -2)
    assert "adapter_model.safetensors has BLAKE3" in refused(shards, VerificationError)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_named(shards: Path, name: str) -> None:
    path = shards / name
    os.truncate(path, path.stat().st_size - 1)
    assert name in refused(shards, ShardError)
    path.unlink()
    assert name in refused(shards, ShardError)


def test_swapped_rank_files_are_named(shards: Path) -> None:
    one, two = (shards / name for name in RANK_FILES)
    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)
    assert "was written as" in refused(shards, ShardError)


def test_an_edited_manifest_or_config_is_refused(shards: Path) -> None:
    config = (shards / "adapter_config.json").read_bytes()
    (shards / "adapter_config.json").write_bytes(config + b"\n")
    assert "adapter_config.json: BLAKE3 differs" in refused(shards, VerificationError)
    (shards / "adapter_config.json").write_bytes(config)
    document = json.loads((shards / "lorashard.json").read_text())
    document["modules"][MODULE]["lora_rank"] = 3
    (shards / "lorashard.json").write_text(json.dumps(document))
    assert f"module {MODULE}" in refused(shards, ManifestError)


def test_cast_shards_are_refused(tmp_path: Path) -> None:
    request = SplitRequest(ep_size=2, dtype="float16")
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "out", request)
    assert "were cast to F16" in refused(tmp_path / "out", ShardError)


def test_a_target_in_the_way_is_replaced_only_if_it_is_an_adapter_and_forced(
    shards: Path, tmp_path: Path
) -> None:
    other = save_fused(tmp_path / "other")
    before = contents(other)
    with pytest.raises(ShardError, match="`force=True` replaces it"):
        merge_shards(shards, other)
    assert contents(other) == before
    merge_shards(shards, other, force=True)
    assert contents(other) == contents(tmp_path / "adapter")
    with pytest.raises(ShardError, match="not what lorashard would write"):
        merge_shards(shards, shards, force=True)
