"""A shard directory as the loader sees it: what the manifest says, and files opened at need."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorashard import SplitRequest, split_adapter
from lorashard.errors import ManifestError, ShardError
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.tiny import (
    MODULE,
    RANK_FILES,
    E,
    H,
    I,
    R,
    flip_bit,
    per_expert_tensors,
    save_adapter,
    save_config,
)

REPLICATED_FILE = "replicated.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The tiny adapter on two ranks, experts (0, 1) and (2, 3)."""
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


def read(contents: AdapterContents, ep_rank: int, name: str, like: Tensor) -> Tensor:
    """A tensor by way of the contents' sources."""
    data = bytearray(like.numel() * like.element_size())
    offset = contents.sources.offset_of(ep_rank, name)
    contents.sources.source_of(ep_rank).read_into(memoryview(data), offset)
    return torch.frombuffer(data, dtype=like.dtype).view(like.shape)


def test_the_module_has_a_stack_for_each_factor_and_the_experts_of_each_file(shards: Path) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
    (module,) = contents.modules
    assert (module.name, module.gate_up, module.ranks) == (MODULE, "split", ((0, 1), (2, 3)))
    assert module.scaling == {"gate_proj": 2.0, "up_proj": 2.0, "down_proj": 2.0}
    assert {(s.projection, s.matrix): (s.rows, s.cols, s.shared) for s in module.stacks} == {
        ("gate_proj", "lora_A"): (R, H, False), ("gate_proj", "lora_B"): (I, R, False),
        ("up_proj", "lora_A"): (R, H, False), ("up_proj", "lora_B"): (I, R, False),
        ("down_proj", "lora_A"): (R, I, False), ("down_proj", "lora_B"): (H, R, False),
    }  # fmt: skip
    assert (contents.num_experts, contents.config.lora_rank) == (E, R)


def test_every_tensor_is_read_from_where_the_source_says_it_is(shards: Path) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        for ep_rank, name in ((0, RANK_FILES[0]), (1, RANK_FILES[1])):
            tensors = load_file(shards / name)
            assert {s.name for s in contents.modules[0].stacks} == set(tensors)
            for key, tensor in tensors.items():
                assert torch.equal(read(contents, ep_rank, key, tensor), tensor)
        replicated = load_file(shards / REPLICATED_FILE)
        assert {entry.name for entry in contents.dense} == set(replicated)
        for key, tensor in replicated.items():
            assert torch.equal(read(contents, REPLICATED, key, tensor), tensor)


def test_a_factor_that_all_experts_share_is_a_stack_and_no_dense_tensor(tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    block = "base_model.model.model.layers.0"
    experts = f"{block}.mlp.experts"
    shared = {name: tensor for name, tensor in tensors.items() if "self_attn" in name}
    shared[f"{experts}.gate_up_proj.lora_A.weight"] = torch.ones(1, R, H)
    shared[f"{experts}.gate_up_proj.lora_B.weight"] = torch.ones(E, 2 * I, R)
    shared[f"{experts}.down_proj.lora_A.weight"] = torch.ones(E, R, I)
    shared[f"{experts}.down_proj.lora_B.weight"] = torch.ones(1, H, R)
    adapter = save_adapter(tmp_path / "adapter", shared)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    with ExitStack() as stack:
        contents = open_shard_directory(tmp_path / "shards", stack)
    stacks = {(s.projection, s.matrix): s.shared for s in contents.modules[0].stacks}
    assert stacks == {
        ("gate_up_proj", "lora_A"): True, ("gate_up_proj", "lora_B"): False,
        ("down_proj", "lora_A"): False, ("down_proj", "lora_B"): True,
    }  # fmt: skip
    assert all("self_attn" in entry.name for entry in contents.dense)


def test_no_rank_file_is_needed_until_its_source_is(shards: Path) -> None:
    (shards / RANK_FILES[1]).unlink()
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        name = contents.modules[0].stacks[0].name
        assert contents.sources.offset_of(0, name) == contents.sources.offset_of(1, name)
        contents.sources.source_of(0)
        with pytest.raises(ShardError, match=f"rank file {RANK_FILES[1]}: .*No such file"):
            contents.sources.source_of(1)


def test_a_file_is_opened_once_and_closed_with_the_stack(shards: Path) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        source = contents.sources.source_of(0)
        assert contents.sources.source_of(0) is source
    with pytest.raises(OSError, match="Bad file descriptor"):
        source.read_into(memoryview(bytearray(1)), 0)


def test_what_is_not_in_a_file_has_no_offset(shards: Path) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        with pytest.raises(ShardError, match=f"rank file {RANK_FILES[0]}: no tensor other"):
            contents.sources.offset_of(0, "other")


def test_a_file_that_ends_while_it_is_read_says_where(shards: Path) -> None:
    size = (shards / RANK_FILES[0]).stat().st_size
    with ExitStack() as stack:
        source = open_shard_directory(shards, stack).sources.source_of(0)
        with pytest.raises(ShardError, match=f"{RANK_FILES[0]}: it ended at byte {size} while"):
            source.read_into(memoryview(bytearray(100)), size - 10)


def write_to(path: Path) -> None:
    flip_bit(path, -1)


def take_over(path: Path) -> None:
    """As a writer does that has not written yet."""
    path.rename(path.parent.parent / path.name)


def put_another_in_its_place(path: Path) -> None:
    (path.parent / "other").write_bytes(path.read_bytes())
    (path.parent / "other").rename(path)


@pytest.mark.parametrize("change", [write_to, take_over, put_another_in_its_place])
@pytest.mark.parametrize("is_linked", [False, True])
def test_a_file_that_changes_while_it_is_read_is_refused(
    shards: Path, tmp_path: Path, change: Callable[[Path], None], is_linked: bool
) -> None:
    path = shards / RANK_FILES[0]
    if is_linked:  # as in the Hub's cache
        path.rename(tmp_path / "blob")
        path.symlink_to(tmp_path / "blob")
    expected = f"rank file {RANK_FILES[0]}: it changed while it was being loaded"
    stack = ExitStack()
    open_shard_directory(shards, stack).sources.source_of(0)
    change(path)
    with pytest.raises(ShardError, match=expected):
        stack.close()


@pytest.mark.parametrize("change", [shutil.rmtree, lambda path: path.rename(path.parent / "b")])
@pytest.mark.parametrize("is_opened", [False, True])
def test_a_directory_that_is_deleted_or_renamed_meanwhile_is_read_as_far_as_it_was_open(
    shards: Path, change: Callable[[Path], None], is_opened: bool
) -> None:
    content = (shards / RANK_FILES[0]).read_bytes()
    data = bytearray(len(content))
    with ExitStack() as stack:
        sources = open_shard_directory(shards, stack).sources
        if is_opened:
            sources.source_of(0)
        change(shards)
        if is_opened or change is not shutil.rmtree:
            sources.source_of(0).read_into(memoryview(data), 0)
            assert data == content
        else:
            with pytest.raises(ShardError, match="replaced while it was being loaded"):
                sources.source_of(0)


def test_another_configuration_than_the_recorded_one_is_refused(shards: Path) -> None:
    save_config(shards, r=R, lora_alpha=7)
    with ExitStack() as stack, pytest.raises(ManifestError, match="not the file that the shards"):
        open_shard_directory(shards, stack)


@pytest.mark.parametrize("ranks", [[[0, 1, 2], [3]], [[0], [1, 2, 3]]])
def test_a_rank_file_needs_a_slot_for_each_expert_of_its_rank(shards: Path, ranks: Any) -> None:
    path = shards / "lorashard.json"
    manifest = json.loads(path.read_text())
    manifest["placement"] |= {"ranks": ranks, "strategy": "explicit"}
    path.write_text(json.dumps(manifest))
    expected = f"the placement puts {len(ranks[0])} experts on rank 0"
    with ExitStack() as stack, pytest.raises(ManifestError, match=expected):
        open_shard_directory(shards, stack)


def test_flipped_bits_are_found_where_every_byte_is_verified(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(shards / RANK_FILES[0], -1)
    with ExitStack() as stack:
        open_shard_directory(shards, stack).sources.source_of(0)  # size and header are right
        monkeypatch.setenv("LORASHARD_VERIFY", "full")
        with pytest.raises(ShardError, match=f"rank file {RANK_FILES[0]}: .* its bytes are not"):
            open_shard_directory(shards, stack).sources.source_of(0)


def test_what_is_read_of_a_directory_that_is_replaced_meanwhile_is_one_version(
    shards: Path, tmp_path: Path
) -> None:
    old = {name: load_file(shards / name) for name in (REPLICATED_FILE, *RANK_FILES[:2])}
    tensors = {name: tensor + 1 for name, tensor in per_expert_tensors().items()}
    newer = save_adapter(tmp_path / "newer", tensors)
    split_adapter(newer, tmp_path / "next", SplitRequest(2))
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        shards.rename(tmp_path / "previous")
        (tmp_path / "next").rename(shards)
        for ep_rank, tensors in zip((REPLICATED, 0, 1), old.values()):
            for name, tensor in tensors.items():
                assert torch.equal(read(contents, ep_rank, name, tensor), tensor)
    with ExitStack() as stack:
        assert open_shard_directory(shards, stack).version != contents.version


def test_a_directory_that_is_replaced_and_deleted_meanwhile_is_to_be_loaded_again(
    shards: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        split_adapter(tmp_path / "adapter", shards, SplitRequest(2), force=True)
        with pytest.raises(ShardError, match="was replaced while it was being loaded"):
            contents.sources.source_of(0)


def test_a_pipe_in_place_of_a_rank_file_is_refused_and_not_waited_for(shards: Path) -> None:
    (shards / RANK_FILES[0]).unlink()
    os.mkfifo(shards / RANK_FILES[0])
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        with pytest.raises(
            ShardError, match=f"rank file {RANK_FILES[0]}: .*a pipe or a device, not a file"
        ):
            contents.sources.source_of(0)
