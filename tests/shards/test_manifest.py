"""Manifest -> lorashard.json: canonical, complete, and easy to read."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import pytest

from lorashard.adapter.options import LayoutOptions
from lorashard.header import TensorEntry
from lorashard.shards.manifest import (
    FileDigest,
    Manifest,
    ModuleInfo,
    ShardFile,
    SourceInfo,
    format_manifest,
)
from lorashard.shards.names import shard_file_names
from lorashard.shards.placement import linear_placement

MODULE = "model.layers.0.mlp.experts"


@pytest.fixture
def manifest() -> Manifest:
    entry = TensorEntry(f"{MODULE}.up_proj.lora_A", "BF16", (64, 2, 6), 96, 1632)
    files = {name: ShardFile(FileDigest(1632, "c" * 64), (entry,)) for name in shard_file_names(2)}
    return Manifest(
        lorashard_version="0.0.0",
        source=SourceInfo("me/adapter", "v1", {"x": FileDigest(7, "a" * 64)}, b"header" * 100),
        options=LayoutOptions(num_experts=128),
        dtype="F16",
        gate_up_known=False,
        placement=linear_placement(128, 2),
        modules={
            MODULE: ModuleInfo("fused", "fused", "concatenated", 2, {"up_proj": 2.0}, (3,), {})
        },
        files=files,
    )


def test_the_same_manifest_gives_the_same_bytes_that_end_with_a_line_break(
    manifest: Manifest,
) -> None:
    raw = format_manifest(manifest)
    assert format_manifest(manifest) == raw
    assert raw.endswith(b"}\n")


def test_every_field_is_written(manifest: Manifest) -> None:
    document = json.loads(format_manifest(manifest))
    assert (document["format"], document["format_version"]) == ("lorashard", 1)
    assert document["options"]["dtype"] == "F16"
    assert document["options"]["gate_up_known"] is False
    assert document["source"]["revision"] == "v1"
    assert document["files"]["replicated.safetensors"]["tensors"] == {
        f"{MODULE}.up_proj.lora_A": {
            "dtype": "BF16", "shape": [64, 2, 6], "offset": 96, "size": 1536,
        }
    }  # fmt: skip


def test_the_source_header_is_packed(manifest: Manifest) -> None:
    packed = json.loads(format_manifest(manifest))["source"]["header"]
    assert zlib.decompress(base64.b64decode(packed)) == b"header" * 100
    assert len(packed) < 100


def test_what_is_the_same_everywhere_is_left_out(manifest: Manifest) -> None:
    document = json.loads(format_manifest(manifest))
    assert "layers" not in document["placement"]
    assert "expert_lora_ranks" not in document["modules"][MODULE]
    layers = {MODULE: manifest.placement.ranks[::-1]}
    placed = replace(manifest, placement=replace(manifest.placement, layers=layers))
    assert MODULE in json.loads(format_manifest(placed))["placement"]["layers"]


def test_a_rank_s_experts_are_on_one_line_however_many_they_are(manifest: Manifest) -> None:
    lines = format_manifest(manifest).decode().splitlines()
    first = next(line for line in lines if line.strip().startswith("[0, 1, 2,"))
    assert first.strip() == f"{list(range(64))},"
