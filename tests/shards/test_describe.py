"""What a manifest says about a layout and a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lorashard import SplitRequest
from lorashard.shards.describe import describe_files, differing_files, make_manifest
from lorashard.shards.manifest import Manifest, SourceInfo
from lorashard.split.pipeline import PreparedSplit, prepared_split
from lorashard.version import __version__
from tests.tiny import MODULE, RANK_FILES, save_adapter

FILES = ("replicated.safetensors", *RANK_FILES)
DIGESTS = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[PreparedSplit]:
    with prepared_split(save_adapter(tmp_path / "adapter"), SplitRequest(ep_size=2)) as split:
        yield split


@pytest.fixture
def manifest(prepared: PreparedSplit) -> Manifest:
    source = SourceInfo(None, None, {}, b"")
    return make_manifest(
        source, prepared.options, prepared.layout, prepared.placement, prepared.plan, DIGESTS,
        dtype="F16",
    )  # fmt: skip


def test_a_manifest_describes_layout_placement_and_files(
    prepared: PreparedSplit, manifest: Manifest
) -> None:
    assert (manifest.lorashard_version, manifest.dtype) == (__version__, "F16")
    assert manifest.placement == prepared.placement
    info = manifest.modules[MODULE]
    assert (info.layout, info.lora_rank, info.absent_experts) == ("per_expert", 2, ())
    assert info.scaling == {"gate_proj": 2.0, "up_proj": 2.0, "down_proj": 2.0}
    assert tuple(manifest.files) == FILES


def test_files_are_described_with_their_digests_in_plan_order(prepared: PreparedSplit) -> None:
    described = describe_files(prepared.plan, DIGESTS)
    assert [file.digest.blake3 for file in described.values()] == list(DIGESTS)
    for file in prepared.plan.files:
        assert described[file.name].tensors == file.tensors
        assert described[file.name].digest.size_bytes == file.size_bytes


def test_no_file_differs_from_its_own_plan(prepared: PreparedSplit, manifest: Manifest) -> None:
    assert differing_files(manifest, prepared.plan) == ()


def test_another_tensor_size_or_file_is_a_difference(
    prepared: PreparedSplit, manifest: Manifest
) -> None:
    files = dict(manifest.files)
    first = files[FILES[1]]
    files[FILES[1]] = replace(first, tensors=first.tensors[::-1])
    second = files[FILES[2]]
    files[FILES[2]] = replace(second, digest=replace(second.digest, size_bytes=1))
    assert differing_files(replace(manifest, files=files), prepared.plan) == FILES[1:]
    del files[FILES[0]]
    assert set(differing_files(replace(manifest, files=files), prepared.plan)) == set(FILES)
