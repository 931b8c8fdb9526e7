"""Any adapter, split any way: every slot holds the right bits, and merge undoes split exactly."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from lorashard import (
    LayoutOptions,
    SplitRequest,
    merge_shards,
    reshard_shards,
    split_adapter,
    verify_shards,
)
from lorashard.errors import LayoutError
from lorashard.writing.blocks import split_into_blocks
from tests.adapters import (
    LAYOUTS,
    NON_GATED_LAYOUTS,
    ONE_TENSOR_PER_EXPERT,
    SPLIT,
    Adapter,
    Spec,
    build,
)
from tests.coded_values import bits
from tests.strategies import rank_lists, specs
from tests.tiny import contents, per_expert_tensors, save_adapter, save_header

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = [Spec(layout) for layout in LAYOUTS] + [Spec(x, gated=False) for x in NON_GATED_LAYOUTS]
case_name = "{0.layout}-gated={0.gated}".format
run = settings(max_examples=30, deadline=None)


@dataclass(frozen=True)
class Job:
    """An adapter and how to split it; block_bytes: what is read at once, None = the default."""

    spec: Spec
    ep_size: int = 3
    strategy: Any = "linear"
    ranks: tuple[tuple[int, ...], ...] | None = None
    block_bytes: int | None = None
    dtype: str | None = None


@st.composite
def jobs(draw: st.DrawFn, **of_specs: Any) -> Job:
    spec = draw(specs(**of_specs))
    ep_size = draw(st.integers(1, 10))
    strategy = draw(st.sampled_from(["linear", "round_robin", "explicit"]))
    ranks = None
    if strategy == "explicit":
        ranks = tuple(map(tuple, draw(rank_lists(spec.num_experts, ep_size))))
    block_bytes = draw(st.sampled_from([None, 1, 8, 40, 200]))
    return Job(spec, ep_size, "linear" if ranks else strategy, ranks, block_bytes)


@dataclass(frozen=True)
class Done:
    """A split that has been carried out in a directory of its own."""

    adapter: Adapter
    source: Path
    shards: Path
    manifest: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.shards / name)


@contextmanager
def carried_out(job: Job) -> Iterator[Done]:
    adapter = build(job.spec)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if job.block_bytes:
            sizes = (job.block_bytes, 2 * job.block_bytes)
            patch.setattr(split_into_blocks, "__defaults__", sizes)
        root = Path(name)
        expert_map = None
        if job.ranks is not None:
            expert_map = root / "map.json"
            expert_map.write_text(json.dumps({"ranks": job.ranks}), encoding="utf-8")
        request = SplitRequest(
            job.ep_size,
            job.strategy,
            expert_map,
            dtype=job.dtype,
            options=LayoutOptions(**adapter.options),
        )
        source, shards = adapter.write(root / "adapter"), root / "shards"
        split_adapter(source, shards, request)
        manifest = json.loads((shards / "lorashard.json").read_bytes())
        yield Done(adapter, source, shards, manifest)


def wrong_slots(done: Done, dtype: torch.dtype | None = None) -> list[str]:
    """The slots that do not hold what the builder says, over all ranks and modules."""
    wrong: list[str] = []
    shared = done.tensors("replicated.safetensors")
    ranks = done.manifest["placement"]["ranks"]
    for ep_rank, experts in enumerate(ranks):
        own = done.tensors(f"ep-{ep_rank:05d}-of-{len(ranks):05d}.safetensors")
        for module in done.adapter.modules:
            for slot, expert in enumerate(experts):
                for projection in done.adapter.spec.trained():
                    pair = done.adapter.factors.get((module, expert, projection))
                    for matrix in (0, 1):
                        name = f"{module}.{projection}.lora_{'AB'[matrix]}"
                        found = own[name][slot] if name in own else shared[name][0]
                        wanted = torch.zeros_like(found)
                        if pair is not None:
                            factor = pair[matrix] if dtype is None else pair[matrix].to(dtype)
                            wanted[: factor.shape[0], : factor.shape[1]] = factor
                        if found.dtype != wanted.dtype or not torch.equal(
                            bits(found), bits(wanted)
                        ):
                            wrong.append(f"rank {ep_rank} {name} expert {expert}")
    return wrong


@pytest.mark.parametrize("spec", CASES, ids=case_name)
def test_each_layout_is_split_expert_by_expert(spec: Spec):
    with carried_out(Job(replace(spec, num_layers=2, extras=True))) as done:
        assert wrong_slots(done) == []


@pytest.mark.parametrize("spec", CASES, ids=case_name)
def test_each_layout_is_merged_to_the_same_file(spec: Spec):
    with carried_out(Job(replace(spec, num_layers=2, fill="bits"), block_bytes=16)) as done:
        merge_shards(done.shards, done.shards.parent / "merged")
        assert_same_adapter(done)


def assert_same_adapter(done: Done) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        merged = done.shards.parent / "merged" / name
        assert merged.read_bytes() == (done.source / name).read_bytes(), name


@given(job=jobs(fill="bits"))
@run
def test_every_slot_holds_its_expert_bit_for_bit(job: Job):
    with carried_out(job) as done:
        assert wrong_slots(done) == []


@given(job=jobs(fill="bits"))
@run
def test_merge_gives_back_the_source_byte_for_byte(job: Job):
    with carried_out(job) as done:
        merge_shards(done.shards, done.shards.parent / "merged")
        assert_same_adapter(done)


@given(job=jobs(fill="random"))
@run
def test_verify_finds_nothing_in_what_split_wrote(job: Job):
    with carried_out(job) as done:
        assert verify_shards(done.shards, against=done.source) == ()


def test_verify_finds_nothing_in_one_fused_expert():
    with carried_out(Job(Spec("L2", num_experts=1), ep_size=1)) as done:
        assert verify_shards(done.shards, against=done.source) == ()


@given(job=jobs(fill="bits"), other=st.sampled_from([None, 8, 64]))
@run
def test_the_same_split_gives_the_same_bytes_whatever_the_block_size(job: Job, other: int | None):
    with carried_out(job) as one, carried_out(replace(job, block_bytes=other)) as two:
        names = sorted(path.name for path in one.shards.iterdir())
        assert names == sorted(path.name for path in two.shards.iterdir())
        for name in names:
            assert (one.shards / name).read_bytes() == (two.shards / name).read_bytes(), name


@given(job=jobs(fill="bits"))
@run
def test_tensors_of_no_expert_are_replicated_unchanged(job: Job):
    with carried_out(replace(job, spec=replace(job.spec, extras=True))) as done:
        found = done.tensors("replicated.safetensors")
        for name, tensor in done.adapter.replicated.items():
            assert torch.equal(bits(found[name]), bits(tensor)), name


@given(job=jobs(fill="random"), dtype=st.sampled_from(sorted(DTYPES)))
@run
def test_a_cast_gives_the_values_that_torch_gives(job: Job, dtype: str):
    with carried_out(replace(job, dtype=dtype)) as done:
        assert wrong_slots(done, DTYPES[dtype]) == []


@given(job=jobs(fill="random"), dtype=st.sampled_from(sorted(DTYPES)))
@run
def test_replicated_tensors_are_cast_as_torch_casts(job: Job, dtype: str):
    job = replace(job, spec=replace(job.spec, extras=True), dtype=dtype)
    with carried_out(job) as done:
        found = done.tensors("replicated.safetensors")
        for name, tensor in done.adapter.replicated.items():
            assert torch.equal(bits(found[name]), bits(tensor.to(DTYPES[dtype]))), name


@given(job=jobs(fill="random"), dtype=st.sampled_from(sorted(DTYPES)))
@run
def test_verify_finds_nothing_after_a_cast(job: Job, dtype: str):
    with carried_out(replace(job, dtype=dtype)) as done:
        assert verify_shards(done.shards, against=done.source) == ()


@given(
    job=jobs(layouts=ONE_TENSOR_PER_EXPERT, fill="bits"),
    projections=st.sets(st.sampled_from(SPLIT), min_size=1),
)
@run
def test_a_projection_that_is_not_trained_is_absent(job: Job, projections: set[str]):
    trained = tuple(p for p in SPLIT if p in projections)
    with carried_out(replace(job, spec=replace(job.spec, projections=trained))) as done:
        assert wrong_slots(done) == []
        stacks = {name.rsplit(".", 2)[1] for name in done.tensors(rank_0(job))}
        assert stacks == projections


@given(job=jobs(layouts=ONE_TENSOR_PER_EXPERT, fill="coded"))
@run
def test_the_manifest_names_every_rank_that_is_not_the_stack_s(job: Job):
    with carried_out(job) as done:
        for module in done.adapter.modules:
            info = done.manifest["modules"][module]
            odd = info.get("expert_lora_ranks", {})
            for projection in done.adapter.spec.trained():
                real = [
                    pair[0].shape[0] if pair else 0
                    for e in range(job.spec.num_experts)
                    for pair in [done.adapter.factors.get((module, e, projection))]
                ]
                told = odd.get(projection, {})
                assert [told.get(str(e), max(real)) for e in range(len(real))] == real


@given(job=jobs(layouts=ONE_TENSOR_PER_EXPERT, fill="coded"))
@run
def test_the_manifest_names_the_experts_that_are_not_trained(job: Job):
    trained = range(job.spec.num_experts) if job.spec.experts is None else job.spec.experts
    absent = sorted(set(range(job.spec.num_experts)) - set(trained))
    with carried_out(job) as done:
        for info in done.manifest["modules"].values():
            assert info["absent_experts"] == absent


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("layout", ["L1", "L2", "L7"])
def test_one_byte_floats_are_rearranged_bit_for_bit(layout: str, dtype: torch.dtype):
    with carried_out(Job(Spec(layout, dtype=dtype, fill="bits"))) as done:
        assert wrong_slots(done) == []


def rank_0(job: Job) -> str:
    return f"ep-00000-of-{job.ep_size:05d}.safetensors"


# 160 experts do not divide by 3.
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_split_and_merged_at_the_size_of_a_real_model(layout: str, strategy: str):
    spec = Spec(layout, num_experts=160, extras=True, fill="random")
    with carried_out(Job(spec, strategy=strategy)) as done:
        assert wrong_slots(done) == []
        assert verify_shards(done.shards, against=done.source) == ()
        merge_shards(done.shards, done.shards.parent / "merged")
        assert_same_adapter(done)


# Real models have 64 to 512 experts, and a partial adapter leaves most of them out.
@pytest.mark.parametrize("num_experts", [64, 128, 512])
def test_an_adapter_that_trains_a_few_of_many_experts_is_split_proven_and_merged(
    tmp_path: Path, num_experts: int
):
    spec = Spec("L1", num_experts=num_experts, experts=(0, 3, num_experts - 1), lora_ranks={3: 1})
    source = build(spec).write(tmp_path / "adapter")
    shards, merged = tmp_path / "shards", tmp_path / "merged"
    request = SplitRequest(ep_size=2, options=LayoutOptions(num_experts=num_experts))
    split_adapter(source, shards, request)
    assert verify_shards(shards, against=source) == ()
    merge_shards(shards, merged)
    assert contents(merged) == contents(source)


def _wrapped(name: str) -> str:
    name = "_orig_mod." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
    return name.replace(".weight", ".default.weight")


def test_wrapper_names_are_left_out_of_the_shards_and_merged_back(tmp_path: Path):
    plain = build(Spec(extras=True))
    tensors = {_wrapped(name): tensor for name, tensor in plain.tensors.items()}
    wrapped = replace(plain, tensors=tensors)
    for name, adapter in (("plain", plain), ("wrapped", wrapped)):
        source = adapter.write(tmp_path / name)
        split_adapter(source, tmp_path / f"{name}-shards", SplitRequest(ep_size=2))
    for file in (tmp_path / "plain-shards").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "wrapped-shards" / file.name).read_bytes()
    assert verify_shards(tmp_path / "wrapped-shards", against=tmp_path / "wrapped") == ()
    merge_shards(tmp_path / "wrapped-shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "wrapped")


@pytest.mark.parametrize(
    ("layout", "mixtral", "lora_rank"),
    [("L8", True, 2), ("L10", False, 2), ("L10", False, 4), ("L14", False, 2), ("L14", False, 4)],
)
def test_stacks_with_experts_last_in_lora_b_give_the_same_shards(
    layout: str, mixtral: bool, lora_rank: int, tmp_path: Path
):
    plain = build(Spec(layout, lora_rank=lora_rank, num_experts=4, extras=True))
    assert mixtral == any(".w1." in name for name in plain.tensors)
    tensors = {
        name: tensor.permute(1, 2, 0).contiguous()
        if ".experts." in name and ".lora_B" in name and tensor.shape[0] > 1
        else tensor
        for name, tensor in plain.tensors.items()
    }
    assert any(tensors[name].shape != plain.tensors[name].shape for name in tensors)
    last = replace(plain, tensors=tensors)
    for name, adapter in (("plain", plain), ("last", last)):
        source = adapter.write(tmp_path / name)
        split_adapter(source, tmp_path / f"{name}-shards", SplitRequest(ep_size=2))
    for file in (tmp_path / "plain-shards").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "last-shards" / file.name).read_bytes()
    assert verify_shards(tmp_path / "last-shards", against=tmp_path / "last") == ()
    merge_shards(tmp_path / "last-shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "last")


def test_experts_and_modules_without_a_rank_are_zeros_and_merged_back(tmp_path: Path):
    spec = Spec("L1", num_experts=64, lora_ranks={0: 0, 7: 3, 63: 0}, extras=True, num_layers=2)
    adapter = build(spec)
    adapter.config["rank_pattern"]["q_proj"] = 0
    for name in [name for name in adapter.tensors if "q_proj" in name]:
        tensor = adapter.tensors[name]
        adapter.tensors[name] = tensor[:0] if ".lora_A." in name else tensor[:, :0].contiguous()
    source = adapter.write(tmp_path / "adapter")
    shards, again, merged = tmp_path / "shards", tmp_path / "again", tmp_path / "merged"
    split_adapter(source, shards, SplitRequest(ep_size=2))
    assert verify_shards(shards, against=source) == ()
    files = [load_file(shards / f"ep-0000{rank}-of-00002.safetensors") for rank in range(2)]
    for name, a in files[0].items():
        assert not a[0].any()
        assert a[1].any()
        assert not files[1][name][31].any()
        assert not any("q_proj" in name for name in load_file(shards / "replicated.safetensors"))
    reshard_shards(shards, again, 4)
    merge_shards(again, merged)
    assert contents(merged) == contents(source)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
)
def test_a_full_weight_of_any_dtype_is_carried_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    bits = torch.arange(64, dtype=torch.uint8).view(dtype).reshape(2, -1)
    tensors = per_expert_tensors() | {"base_model.model.score.weight": bits}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=2))
    assert verify_shards(tmp_path / "shards") == ()
    assert verify_shards(tmp_path / "shards", against=adapter) == ()
    merge_shards(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)
    split_adapter(adapter, tmp_path / "cast", SplitRequest(ep_size=2, dtype="bfloat16"))
    assert verify_shards(tmp_path / "cast", against=adapter) == ()
    (kept,) = (
        t
        for n, t in load_file(tmp_path / "cast" / "replicated.safetensors").items()
        if "score" in n
    )
    assert kept.dtype == dtype
    assert torch.equal(kept.view(torch.uint8), bits.view(torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F4", [2, 24]), ("F6_E2M3", [4, 8]), ("F6_E3M2", [32])]
)
def test_elements_that_are_parts_of_a_byte_are_carried_bit_for_bit(
    tmp_path: Path, dtype: str, shape: list[int]
) -> None:
    adapter = tmp_path / "adapter"
    write_with_score(adapter, dtype, shape, bytes(range(100, 124)))
    for target, cast in ((tmp_path / "shards", None), (tmp_path / "cast", "bfloat16")):
        split_adapter(adapter, target, SplitRequest(ep_size=2, dtype=cast))
        assert verify_shards(target, against=adapter) == ()
        assert bytes(range(100, 124)) in (target / "replicated.safetensors").read_bytes()
    merge_shards(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)
    reshard_shards(tmp_path / "shards", tmp_path / "resharded", 3)
    assert verify_shards(tmp_path / "resharded", against=adapter) == ()
    write_with_score(adapter, dtype, shape, bytes(range(101, 125)))
    (finding,) = verify_shards(tmp_path / "shards", against=adapter)
    assert "model.score.weight" in finding


def test_a_factor_in_parts_of_a_byte_is_refused_by_the_name_of_its_dtype(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.experts.4.up_proj.lora_A.weight"
    write_with_score(tmp_path / "adapter", "F4", [2, 24], bytes(24), name)
    with pytest.raises(LayoutError, match="a LoRA factor cannot have dtype F4"):
        split_adapter(tmp_path / "adapter", tmp_path / "out", SplitRequest(ep_size=2))


def write_with_score(
    adapter: Path,
    dtype: str,
    shape: list[int],
    data: bytes,
    name: str = "base_model.model.score.weight",
) -> None:
    """An adapter with another weight, of a dtype that torch may lack."""
    raw = save(per_expert_tensors())
    begin = 8 + int.from_bytes(raw[:8], "little")
    header, rest = json.loads(raw[8:begin]), raw[begin:]
    offsets = [len(rest), len(rest) + len(data)]
    info = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    save_header(adapter, header | {name: info}, rest + data)
