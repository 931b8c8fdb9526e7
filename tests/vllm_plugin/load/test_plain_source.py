"""A plain adapter sliced in memory: what a rank file would hold, and nothing of other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.options import LayoutOptions
from lorashard.errors import AdapterError, LorashardError
from lorashard.storage.local import LocalFile
from lorashard.storage.safetensors_file import read_header
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents
from lorashard.vllm_plugin.load.kept_plans import KeptPlans
from lorashard.vllm_plugin.load.plain_source import has_experts, open_plain_adapter
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.tiny import (
    MODULE,
    RANK_FILES,
    E,
    H,
    I,
    per_expert_tensors,
    save_adapter,
    save_fused,
    save_pickled,
)
from tests.vllm_plugin.load.plain_loads import read_stacks

OPTIONS = LayoutOptions(num_experts=E, hidden_size=H, intermediate_size=I, gate_up="concatenated")
RANKS = ((0, 1), (2, 3))
Opened = Callable[..., AdapterContents | None]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def opened() -> Iterator[Opened]:
    """What a rank with these experts has of an adapter, whose files stay open for the test."""
    with ExitStack() as stack:

        def open_for_rank(
            path: Path, experts: tuple[int, ...] = RANKS[0]
        ) -> AdapterContents | None:
            return open_plain_adapter(path, OPTIONS, lambda _: experts, stack, KeptPlans())

        yield open_for_rank


@pytest.mark.parametrize("save", [save_adapter, save_fused, save_pickled])
@pytest.mark.parametrize("ep_rank", [0, 1])
def test_a_rank_has_what_its_file_of_a_split_has(
    tmp_path: Path,
    opened: Opened,
    threads: ThreadPoolExecutor,
    save: Callable[[Path], Path],
    ep_rank: int,
) -> None:
    adapter = save(tmp_path / "adapter")
    request = SplitRequest(2, options=OPTIONS, allow_pickle=True)
    split_adapter(adapter, tmp_path / "shards", request)
    contents = opened(adapter, RANKS[ep_rank])
    assert contents is not None
    expected = load_file(tmp_path / "shards" / RANK_FILES[ep_rank])
    assert read_stacks(contents, threads) == {
        name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in expected.items()
    }
    with ExitStack() as stack:
        (of_shards,) = open_shard_directory(tmp_path / "shards", stack).modules
    (module,) = contents.modules
    assert module.ranks == (RANKS[ep_rank],)
    assert (module.name, module.gate_up) == (of_shards.name, of_shards.gate_up)
    assert (module.scaling, set(module.stacks)) == (of_shards.scaling, set(of_shards.stacks))


def test_each_layer_has_the_experts_that_the_rank_has_of_it(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tensors = per_expert_tensors(layers=2)
    adapter = save_adapter(tmp_path, tensors)
    own = {MODULE: (3, 1), MODULE.replace("0", "1"): (2,)}
    with ExitStack() as stack:
        contents = open_plain_adapter(adapter, OPTIONS, own.__getitem__, stack, KeptPlans())
        assert contents is not None
        found = read_stacks(contents, threads)
    assert contents.num_experts == E
    assert {module.name: module.ranks for module in contents.modules} == {
        name: (experts,) for name, experts in own.items()
    }
    for name, experts in own.items():
        expected = [tensors[f"base_model.model.{name}.{e}.up_proj.lora_A.weight"] for e in experts]
        data = torch.stack(expected).view(torch.uint8).numpy().tobytes()
        assert found[f"{name}.up_proj.lora_A"] == data


@pytest.mark.parametrize("experts", [(0, 1), (2,)])
def test_what_is_put_in_order_needs_no_zeros_before(
    tmp_path: Path, opened: Opened, experts: tuple[int, ...]
) -> None:
    fused = opened(save_fused(tmp_path / "fused"), experts)
    plain = opened(save_adapter(tmp_path / "plain"), experts)
    assert fused is not None
    assert plain is not None
    assert fused.rearranged == {f"{MODULE}.gate_up_proj.lora_B", f"{MODULE}.down_proj.lora_B"}
    assert not plain.rearranged


def test_dense_tensors_are_those_beside_the_experts(tmp_path: Path, opened: Opened) -> None:
    contents = opened(save_adapter(tmp_path))
    assert contents is not None
    tensors = per_expert_tensors()
    names = [name for name in tensors if "self_attn" in name]
    assert sorted(entry.name for entry in contents.dense) == sorted(names)
    for entry in contents.dense:
        data = bytearray(entry.end - entry.begin)
        contents.sources.source_of(REPLICATED).read_into(memoryview(data), entry.begin)
        assert torch.equal(
            torch.frombuffer(data, dtype=torch.bfloat16).view(entry.shape), tensors[entry.name]
        )


def test_experts_without_lora_are_zero_whatever_the_memory_held(
    tmp_path: Path, opened: Opened, threads: ThreadPoolExecutor
) -> None:
    tensors = per_expert_tensors()
    trained = {name: t for name, t in tensors.items() if ".experts.1." not in name}
    contents = opened(save_adapter(tmp_path, trained))
    assert contents is not None
    for name, data in read_stacks(contents, threads).items():
        half = len(data) // 2
        assert any(data[:half]), name
        assert not any(data[half:]), name


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_a_rank_without_experts_has_stacks_of_no_bytes(
    tmp_path: Path, opened: Opened, threads: ThreadPoolExecutor, save: Callable[[Path], Path]
) -> None:
    contents = opened(save(tmp_path), experts=())
    assert contents is not None
    assert set(read_stacks(contents, threads).values()) == {b""}


def test_bytes_of_other_ranks_experts_are_not_read(
    tmp_path: Path, opened: Opened, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tmp_path)
    _, header = read_header(adapter / "adapter_model.safetensors")
    reads: list[tuple[int, int]] = []
    read_into = LocalFile.read_into

    def recorded(self: LocalFile, buffer: memoryview, offset: int) -> None:
        reads.append((offset, offset + len(buffer)))
        read_into(self, buffer, offset)

    contents = opened(adapter, experts=(2,))
    assert contents is not None
    monkeypatch.setattr(LocalFile, "read_into", recorded)  # opening it reads a sample of all
    read_stacks(contents, threads)
    by_expert = dict.fromkeys("0123", 0)
    sizes = dict.fromkeys("0123", 0)
    for entry in header.tensors:
        expert = entry.name.partition(".experts.")[2][:1]
        if expert:
            overlaps = (min(end, entry.end) - max(begin, entry.begin) for begin, end in reads)
            by_expert[expert] += sum(size for size in overlaps if size > 0)
            sizes[expert] += entry.end - entry.begin
    assert by_expert == dict.fromkeys("013", 0) | {"2": sizes["2"]}


@pytest.mark.parametrize("config", [{}, {"peft_type": "LOHA"}])
def test_an_adapter_without_experts_is_left_to_vllm_even_if_it_is_faulty(
    tmp_path: Path, opened: Opened, config: dict[str, Any]
) -> None:
    tensors = {name: t for name, t in per_expert_tensors().items() if "self_attn" in name}
    assert opened(save_adapter(tmp_path, tensors, **config)) is None


def test_a_faulty_adapter_with_experts_is_refused(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(LorashardError, match="LOHA"):
        opened(save_adapter(tmp_path, peft_type="LOHA"))


def test_what_is_no_adapter_is_refused(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(AdapterError):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"base_model.model.{MODULE}.0.up_proj.lora_A.weight", True),
        ("odd.prefix.experts.w1.lora_down", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("base_model.model.model.layers.0.mlp.shared_experts.up_proj.lora_A.weight", False),
    ],
)
def test_expert_weights_are_told_by_their_names(tmp_path: Path, name: str, expected: bool) -> None:
    save_adapter(tmp_path, {name: torch.ones(2, 2)})
    _, header = read_header(tmp_path / "adapter_model.safetensors")
    assert has_experts(header.tensors) == expected


@pytest.mark.parametrize("pickled", [False, True])
def test_the_next_adapter_of_a_training_has_another_version_and_a_copy_has_not(
    tmp_path: Path, opened: Opened, pickled: bool
) -> None:
    save = save_pickled if pickled else save_adapter
    tensors = per_expert_tensors(hidden=64 * H)
    trained = {name: tensor * 1.01 for name, tensor in tensors.items()}
    versions = []
    for name, saved in (("one", tensors), ("copy", tensors), ("next", trained)):
        contents = opened(save(tmp_path / name, saved))
        assert contents is not None
        versions.append(contents.version)
    assert versions[0] == versions[1] != versions[2]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1268776904\n"


def renamed(old: str, new: str) -> Callable[[Path], object]:
    tensors = {name.replace(old, new): value for name, value in per_expert_tensors().items()}
    return lambda path: save_adapter(path, tensors)


def empty(path: Path) -> None:
    save_adapter(path, {name: torch.empty(0) for name in per_expert_tensors()})


def pointer(path: Path) -> None:
    (save_adapter(path) / "adapter_model.safetensors").write_bytes(POINTER)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (empty, ("is empty", "ZeRO-3", "gathered")),
        (pointer, ("Git LFS pointer", "git lfs pull", "hf download")),
        (lambda path: save_adapter(path, lora_alpha=0), ("lora_alpha is 0", "of the training")),
        (renamed("lora_A", "adapter.linear_in"), ("Megatron's own", "Megatron-Bridge")),
        (
            renamed("mlp.experts", "mlp.deepspeed_moe.experts.deepspeed_experts"),
            ("DeepSpeed", "vLLM has no model"),
        ),
    ],
    ids=["zero3", "lfs", "alpha", "megatron", "deepspeed"],
)
def test_a_server_names_the_cause_and_the_way_out_too(
    tmp_path: Path,
    opened: Opened,
    save: Callable[[Path], object],
    words: tuple[str, ...],
) -> None:
    save(tmp_path / "adapter")
    with pytest.raises(LorashardError) as caught:
        opened(tmp_path / "adapter")
    for word in words:
        assert word in str(caught.value)
