"""`--against` reads both sides once, in threads, and tells what the comparison alone would tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorashard import SplitRequest, split_adapter
from lorashard.shards.directory import read_manifest
from lorashard.shards.manifest import format_manifest
from lorashard.verify.against import compare_with_adapter
from lorashard.verify.reference.compare import compare_with_source
from tests.imports import RUN, imported_by
from tests.tiny import RANK_FILES, per_expert_tensors, save_adapter, save_fused

LAYERS = 20


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", per_expert_tensors(layers=LAYERS))


@pytest.fixture
def shards(adapter: Path, tmp_path: Path) -> Path:
    split_adapter(adapter, tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def compare(
    shards: Path, adapter: Path, progress: Callable[[int], None] = lambda _: None
) -> tuple[str, ...]:
    manifest = read_manifest(shards)
    return compare_with_adapter(manifest, shards, adapter, progress, allow_pickle=False)


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_without_a_cast_torch_is_not_imported(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    adapter, shards = save(tmp_path / "adapter"), tmp_path / "out"
    split_adapter(adapter, shards, SplitRequest(ep_size=2))
    assert "torch" not in imported_by(RUN, "verify", shards, "--against", adapter)


def test_threads_tell_what_one_thread_tells_in_the_same_order(shards: Path, adapter: Path) -> None:
    for name in ("replicated.safetensors", *RANK_FILES):
        tensors = load_file(shards / name)
        for position, tensor in enumerate(tensors.values()):
            if position % 3 == 0:
                tensor.add_(1)
        save_file(tensors, shards / name)
    document = json.loads(format_manifest(read_manifest(shards)))
    one_by_one = compare_with_source(shards, adapter, document, lambda _: None)
    findings = compare(shards, adapter)
    assert findings == tuple(chain.from_iterable(one_by_one))
    assert len(findings) > LAYERS


def test_another_adapter_is_not_compared_to_the_end(
    shards: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(weights(adapter)).items()}
    other = save_adapter(tmp_path / "other", tensors)
    seen: list[int] = []
    (finding,) = compare(shards, other, seen.append)
    assert finding.startswith(f"{other}: not the adapter that the shards were split from")
    assert sum(seen) < sum(tensor.nbytes for tensor in tensors.values()) / 2


def test_the_first_difference_of_another_adapter_may_be_its_last_value(
    shards: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = load_file(weights(adapter))
    name = max(name for name in tensors if "experts" in name)
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    other = save_adapter(tmp_path / "other", tensors)
    seen: list[int] = []
    (finding,) = compare(shards, other, seen.append)
    assert finding.startswith(f"{other}: not the adapter that the shards were split from")
    assert "up_proj.lora_B: expert 3 " in finding
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())


def test_every_difference_from_the_source_is_told_if_its_weights_are_the_source(
    shards: Path, adapter: Path
) -> None:
    with (adapter / "adapter_config.json").open("a") as file:
        file.write("\n")
    tensors = load_file(shards / RANK_FILES[1])
    name = max(tensors)
    save_file(tensors | {name: tensors[name] + 1}, shards / RANK_FILES[1])
    first, *others = compare(shards, adapter)
    assert first == "adapter_config.json: not the same bytes as in the source."
    assert len(others) == len(tensors[name])


def weights(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"
