"""When a directory counts as what a split would write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashard import LayoutOptions, SplitRequest, reshard_shards, split_adapter
from lorashard.errors import AdapterError
from lorashard.split.pipeline import prepared_split
from lorashard.split.resume import find_finished_split
from tests.tiny import MODULE, RANK_FILES, flip_bit, per_expert_tensors, save_adapter, save_config

REQUEST = SplitRequest(ep_size=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


@pytest.fixture
def shards(adapter: Path, tmp_path: Path) -> Path:
    split_adapter(adapter, tmp_path / "out", REQUEST)
    return tmp_path / "out"


def is_finished(adapter: Path, shards: Path, request: SplitRequest = REQUEST) -> bool:
    with prepared_split(adapter, request) as prepared:
        return find_finished_split(shards, prepared, request, lambda _: None) is not None


def test_the_same_split_is_finished(adapter: Path, shards: Path) -> None:
    assert is_finished(adapter, shards)


def test_all_bytes_of_a_local_source_are_compared(adapter: Path, shards: Path) -> None:
    done: list[int] = []
    with prepared_split(adapter, REQUEST) as prepared:
        assert find_finished_split(shards, prepared, REQUEST, done.append)
        expected = prepared.source.index.file_size - len(prepared.source.header)
    assert sum(done) == expected


def test_a_directory_that_is_not_there_is_not_finished(adapter: Path, tmp_path: Path) -> None:
    assert not is_finished(adapter, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter, _: flip_bit(adapter / "adapter_model.safetensors", -1),
        lambda adapter, _: save_adapter(adapter, per_expert_tensors(hidden=16)),
        lambda adapter, _: save_config(adapter, lora_alpha=16),
        lambda _, shards: (shards / RANK_FILES[1]).unlink(),
        lambda _, shards: (shards / "lorashard.json").write_text("{}"),
    ],
    ids=["value", "shape", "config", "missing rank", "damaged manifest"],
)
def test_whatever_differs_makes_it_unfinished(
    adapter: Path, shards: Path, change: Callable[[Path, Path], object]
) -> None:
    change(adapter, shards)
    assert not is_finished(adapter, shards)


@pytest.mark.parametrize(
    "request_",
    [
        SplitRequest(ep_size=4),
        SplitRequest(ep_size=2, strategy="round_robin"),
        SplitRequest(ep_size=2, dtype="float16"),
        SplitRequest(ep_size=2, options=LayoutOptions(num_experts=6)),
    ],
    ids=["ep_size", "strategy", "dtype", "num_experts"],
)
def test_another_request_makes_it_unfinished(
    adapter: Path, shards: Path, request_: SplitRequest
) -> None:
    assert not is_finished(adapter, shards, request_)


def test_shards_that_were_resharded_to_this_placement_are_finished(
    adapter: Path, shards: Path, tmp_path: Path
) -> None:
    reshard_shards(shards, tmp_path / "four", 4)
    assert is_finished(adapter, tmp_path / "four", SplitRequest(ep_size=4))


def test_a_tensor_table_that_was_edited_makes_it_unfinished(adapter: Path, shards: Path) -> None:
    path = shards / "lorashard.json"
    document = json.loads(path.read_text())
    document["files"]["replicated.safetensors"]["tensors"].popitem()
    path.write_text(json.dumps(document))
    assert not is_finished(adapter, shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["modules"][MODULE]["scaling"].update(gate_proj=4.0),
        lambda document: document["modules"][MODULE].update(lora_rank=1),
        lambda document: document["modules"][MODULE].update(gate_up="interleaved"),
        lambda document: document["options"].update(gate_up_known=False),
    ],
    ids=["scaling", "lora_rank", "gate_up", "gate_up_known"],
)
def test_a_manifest_that_does_not_follow_from_its_source_is_unfinished(
    adapter: Path, shards: Path, change: Callable[[Any], object]
) -> None:
    path = shards / "lorashard.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    assert not is_finished(adapter, shards)


def test_a_source_that_changes_while_it_is_digested_is_refused(adapter: Path, shards: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    os.utime(weights, ns=(0, 10**18))
    with (
        prepared_split(adapter, REQUEST) as prepared,
        pytest.raises(AdapterError, match="it changed while being read"),
    ):
        find_finished_split(shards, prepared, REQUEST, lambda _: flip_bit(weights, -1))


@pytest.mark.parametrize("name", ["adapter_config.json", "replicated.safetensors", *RANK_FILES])
def test_damaged_bytes_make_it_unfinished(adapter: Path, shards: Path, name: str) -> None:
    flip_bit(shards / name, -1)
    assert not is_finished(adapter, shards)
