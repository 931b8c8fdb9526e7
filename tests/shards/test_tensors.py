"""The tensors of a finished directory from Python, here and behind a URL."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch

from lorashard import SplitRequest, open_shards, split_adapter
from lorashard.errors import ManifestError, ShardError
from tests.tiny import MODULE, RANK_FILES, flip_bit, per_expert_tensors, save_adapter

PREFIX = f"base_model.model.{MODULE}"
GATE_A = f"{MODULE}.gate_proj.lora_A"
Q_PROJ_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def test_the_placement_lists_global_experts_in_slot_order(shards: Path) -> None:
    assert open_shards(shards).placement.ranks == ((0, 1), (2, 3))


def test_a_rank_holds_its_experts_in_slot_order(shards: Path) -> None:
    source = per_expert_tensors()
    opened = open_shards(shards)
    for ep_rank, experts in enumerate(opened.placement.ranks):
        stack = opened.rank(ep_rank).tensor(GATE_A)
        expected = [source[f"{PREFIX}.{expert}.gate_proj.lora_A.weight"] for expert in experts]
        assert torch.equal(stack, torch.stack(expected))


def test_bytes_are_those_of_the_tensor(shards: Path) -> None:
    rank = open_shards(shards).rank(1)
    for name in rank.entries:
        expected = rank.tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert rank.read_bytes(name) == expected


def test_replicated_tensors_keep_their_source_names(shards: Path) -> None:
    replicated = open_shards(str(shards)).replicated()
    assert torch.equal(replicated.tensor(Q_PROJ_A), per_expert_tensors()[Q_PROJ_A])


def test_modules_say_how_to_scale(shards: Path) -> None:
    assert open_shards(shards).modules[MODULE].scaling["gate_proj"] == 2.0


@pytest.mark.parametrize("ep_rank", [-1, 2, 10**9])
def test_a_rank_that_does_not_exist_is_refused(shards: Path, ep_rank: int) -> None:
    with pytest.raises(ShardError, match=f"no ep rank {ep_rank}; there are 2"):
        open_shards(shards).rank(ep_rank)


def test_an_unknown_tensor_is_a_key_error(shards: Path) -> None:
    rank = open_shards(shards).rank(0)
    for read in (rank.tensor, rank.read_bytes):
        with pytest.raises(KeyError, match="nothing"):
            read("nothing")


def test_a_directory_without_a_manifest_is_not_finished(shards: Path, tmp_path: Path) -> None:
    (shards / "lorashard.json").unlink()
    with pytest.raises(ManifestError, match="not a finished shard directory"):
        open_shards(shards)
    with pytest.raises(ManifestError, match="no such directory") as raised:
        open_shards(tmp_path / "nowhere")
    assert raised.value.hint == "Is the name right?"


def test_a_missing_rank_file_is_named(shards: Path) -> None:
    (shards / RANK_FILES[1]).unlink()
    opened = open_shards(shards)
    opened.rank(0)
    with pytest.raises(ShardError, match=f"{RANK_FILES[1]}: No such file"):
        opened.rank(1)


@pytest.mark.parametrize("cut", [1, 500, 900])
def test_a_cut_off_rank_file_is_refused(shards: Path, cut: int) -> None:
    path = shards / RANK_FILES[0]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ShardError, match=RANK_FILES[0]):
        open_shards(shards).rank(0)


def test_a_rank_file_of_another_adapter_is_refused(shards: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", per_expert_tensors(hidden=16))
    split_adapter(other, tmp_path / "other-out", SplitRequest(ep_size=2))
    shutil.copy(tmp_path / "other-out" / RANK_FILES[0], shards / RANK_FILES[0])
    with pytest.raises(ShardError, match=RANK_FILES[0]):
        open_shards(shards).rank(0)


def test_a_rank_file_of_another_ep_size_is_refused(shards: Path, tmp_path: Path) -> None:
    split_adapter(tmp_path / "adapter", tmp_path / "four", SplitRequest(ep_size=4))
    shutil.copy(tmp_path / "four" / "ep-00000-of-00004.safetensors", shards / RANK_FILES[0])
    with pytest.raises(ShardError, match=RANK_FILES[0]):
        open_shards(shards).rank(0)


def test_swapped_rank_files_are_refused(shards: Path) -> None:
    one, two = (shards / name for name in RANK_FILES)
    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)
    with pytest.raises(ShardError):
        open_shards(shards).rank(0)


def test_a_damaged_header_is_refused(shards: Path) -> None:
    flip_bit(shards / RANK_FILES[0], 8)
    with pytest.raises(ShardError, match=RANK_FILES[0]):
        open_shards(shards).rank(0)


def test_of_a_url_only_the_file_that_is_asked_for_is_fetched(shards: Path) -> None:
    opened = open_shards(shards.as_uri())
    (shards / RANK_FILES[1]).unlink()
    local = open_shards(shards).rank(0)
    remote = opened.rank(0)
    assert torch.equal(remote.tensor(GATE_A), local.tensor(GATE_A))
    assert remote.path.parent != shards
    assert [path.name for path in remote.path.parent.iterdir()] == [RANK_FILES[0]]
    with pytest.raises(ShardError, match=f"no {RANK_FILES[1]}"):
        opened.rank(1)


def test_a_file_of_a_url_is_fetched_once_and_kept_as_long_as_it_is_used(shards: Path) -> None:
    opened = open_shards(shards.as_uri())
    rank = opened.rank(0)
    assert opened.rank(0).path == rank.path
    copy = rank.path
    del opened
    gc.collect()
    assert rank.read_bytes(GATE_A) == open_shards(shards).rank(0).read_bytes(GATE_A)
    del rank
    gc.collect()
    assert not copy.parent.exists()


def test_a_directory_keeps_what_it_fetched(shards: Path) -> None:
    opened = open_shards(shards.as_uri())
    copy = opened.replicated().path
    gc.collect()
    assert copy.exists()
    del opened
    gc.collect()
    assert not copy.exists()


def test_a_damaged_file_of_a_url_is_refused(shards: Path) -> None:
    flip_bit(shards / RANK_FILES[0], 8)
    with pytest.raises(ShardError, match=RANK_FILES[0]):
        open_shards(shards.as_uri()).rank(0)


def test_only_a_local_directory_has_a_path(shards: Path) -> None:
    assert open_shards(shards).path == shards
    with pytest.raises(ShardError, match="not on this machine"):
        _ = open_shards(shards.as_uri()).path
