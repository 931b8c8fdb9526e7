"""Which bytes are read and where they go, as plain values; no file and no tensor is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.errors import LayoutError
from lorashard.vllm_plugin.load import reads
from lorashard.vllm_plugin.load.assembly import Assembly, DeviceFactor, Piece, ShardStack
from lorashard.vllm_plugin.load.contents import REPLICATED, Scaling
from lorashard.vllm_plugin.load.reads import (
    LayerPlan,
    PlacedFactor,
    place_factors,
    plan_copies,
    plan_reads,
)
from lorashard.vllm_plugin.load.rows import Run

ROWS, COLS = 4, 6
SLOT = ROWS * COLS * 2  # bytes of one expert's factor in BF16
STACK = ShardStack("experts.down_proj.lora_B", "down_proj", "lora_B", "BF16", ROWS, COLS, False)
SHARED = replace(STACK, name="experts.up_proj.lora_B", projection="up_proj", shared=True)
OFFSETS = {(0, STACK.name): 1000, (1, STACK.name): 5000, (REPLICATED, SHARED.name): 700}


def offset_of(ep_rank: int, name: str) -> int:
    return OFFSETS[ep_rank, name]


def factor(stack: ShardStack, num_slots: int) -> DeviceFactor:
    rows = range(stack.rows)
    return DeviceFactor(num_slots, stack.rows, stack.cols, (Piece(stack, rows, rows),))


def layer(
    *factors: DeviceFactor,
    runs: tuple[Run, ...] = (Run(0, 0, 0, 3),),
    experts: tuple[int, ...] = (4, 5, 6),
    scaling: Scaling = 1.0,
) -> LayerPlan:
    placed = tuple(PlacedFactor(each, 4096 * number) for number, each in enumerate(factors))
    return LayerPlan("layer", placed, runs, experts, {"down_proj": scaling, "up_proj": scaling})


def planned(plan: LayerPlan, dtype: str = "BF16") -> list[reads.ReadJob]:
    return list(plan_reads([plan], offset_of, dtype))


def test_neighbouring_experts_are_one_read_straight_to_their_slots() -> None:
    (job,) = planned(layer(factor(STACK, 3)))
    assert (job.ep_rank, job.offset, job.size_bytes, job.is_verbatim) == (0, 1000, 3 * SLOT, True)
    assert (job.region_offset, job.shape) == (0, (3, ROWS, COLS))


def test_every_run_is_read_from_its_own_file_to_its_own_slots() -> None:
    runs = (Run(1, src_slot=2, dst_slot=0, count=1), Run(0, src_slot=5, dst_slot=1, count=2))
    first, second = planned(layer(factor(STACK, 3), runs=runs))
    assert (first.ep_rank, first.offset, first.device_slots) == (1, 5000 + 2 * SLOT, slice(0, 1))
    assert (second.ep_rank, second.offset) == (0, 1000 + 5 * SLOT)
    assert (second.device_slots, second.region_offset) == (slice(1, 3), SLOT)


def test_a_stack_of_another_dtype_is_not_read_straight_to_its_place() -> None:
    (job,) = planned(layer(factor(replace(STACK, dtype="F32"), 3)))
    assert not job.is_verbatim
    assert job.size_bytes == 2 * 3 * SLOT
    assert [placed.into.offset for placed in job.pieces] == [0]


def test_a_stack_that_becomes_two_tensors_is_read_once() -> None:
    halves = [
        DeviceFactor(3, 2, COLS, (Piece(STACK, rows, range(2)),))
        for rows in (range(2), range(2, 4))
    ]
    (job,) = planned(layer(*halves))
    assert not job.is_verbatim
    assert [(p.piece.source_rows, p.into.offset) for p in job.pieces] == [
        (range(2), 0), (range(2, 4), 4096),
    ]  # fmt: skip


def test_only_lora_b_is_scaled_and_each_expert_by_its_own_number() -> None:
    scaling = tuple(float(expert) for expert in range(8))
    (job,) = planned(layer(factor(STACK, 3), scaling=scaling))
    assert job.scaling == (4.0, 5.0, 6.0)
    lora_a = replace(STACK, matrix="lora_A")
    (job,) = planned(layer(factor(lora_a, 3), scaling=scaling))
    assert job.scaling is None


@pytest.mark.parametrize(("scaling", "expected"), [(1.0, None), (2.0, 2.0)])
def test_a_scaling_of_1_is_nothing_to_multiply_by(scaling: float, expected: Any) -> None:
    assert [job.scaling for job in planned(layer(factor(STACK, 3), scaling=scaling))] == [expected]


def test_a_factor_that_all_share_is_repeated_in_every_slot_and_scaled_there() -> None:
    (job,) = planned(layer(factor(SHARED, 3), scaling=tuple(map(float, range(8)))))
    assert (job.ep_rank, job.offset, job.num_slots) == (REPLICATED, 700, 1)
    assert (job.device_slots, job.is_verbatim) == (slice(None), False)
    assert (job.first_slot, [placed.piece.stack for placed in job.pieces]) == (0, [SHARED])
    assert job.scaling == (4.0, 5.0, 6.0)


def test_a_factor_that_the_engine_shares_too_is_read_straight_to_its_one_slot() -> None:
    (job,) = planned(layer(factor(SHARED, 1), scaling=(0.0, 2.0, 2.0, 0.0)))
    assert (job.is_verbatim, job.size_bytes, job.scaling) == (True, SLOT, 2.0)


def test_scalings_that_differ_do_not_fit_into_one_slot() -> None:
    with pytest.raises(
        LayoutError, match=r"^layer: the experts share a factor but not its"
    ) as caught:
        planned(layer(factor(SHARED, 1), scaling=(1.0, 2.0)))
    assert caught.value.hint == "Start vLLM without --enable-moe-shared-loras."


@pytest.mark.parametrize(("scaling", "expected"), [(2.0, 2.0), (0.0, None), ((0.0, 0.0), None)])
def test_one_scaling_for_all_is_that_of_the_one_slot_and_none_is_nothing_to_multiply_by(
    scaling: Scaling, expected: float | None
) -> None:
    (job,) = planned(layer(factor(SHARED, 1), scaling=scaling))
    assert job.scaling == expected


def test_a_stack_that_is_left_to_others_does_not_keep_the_rest_from_being_read() -> None:
    plan = layer(factor(STACK, 3), factor(SHARED, 3))
    (job,) = plan_reads([plan], offset_of, "BF16", {STACK.name})
    assert job.stack == SHARED


@pytest.mark.parametrize(("dtype", "num_jobs"), [("BF16", 2), ("F32", 4)])
def test_blocks_that_need_no_scratch_memory_are_larger(
    monkeypatch: pytest.MonkeyPatch, dtype: str, num_jobs: int
) -> None:
    monkeypatch.setattr(reads, "BLOCK_BYTES", SLOT)
    monkeypatch.setattr(reads, "VERBATIM_BYTES", 2 * SLOT)
    runs = (Run(0, 0, 0, 4),)
    plan = layer(factor(STACK, 4), runs=runs, experts=tuple(range(4)))
    assert len(planned(plan, dtype)) == num_jobs


@pytest.mark.parametrize("size", [0, 1, reads.BLOCK_BYTES, 2 * reads.BLOCK_BYTES + 5])
def test_dense_tensors_are_copied_in_blocks_from_the_regions_beginning_on(size: int) -> None:
    jobs = [*plan_copies(100, 100 + size)]
    assert [job.begin for job in jobs] == [*range(100, 100 + size, reads.BLOCK_BYTES)]
    assert all((job.ep_rank, job.target) == (REPLICATED, job.begin - 100) for job in jobs)
    assert sum(job.size for job in jobs) == size
    assert all(0 < job.size <= reads.BLOCK_BYTES for job in jobs)


def test_a_rank_with_one_expert_takes_that_expert_s_scaling_from_those_that_differ() -> None:
    (job,) = planned(layer(factor(SHARED, 1), experts=(1,), scaling=(1.0, 2.0)))
    assert job.scaling == (2.0,)


@settings(deadline=None)
@given(count=st.integers(1, 40), block=st.integers(1, 8 * SLOT))
def test_blocks_cover_a_run_once_and_none_is_larger_than_it_need_be(count: int, block: int) -> None:
    plan = layer(factor(STACK, count), runs=(Run(0, 3, 0, count),), experts=tuple(range(count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "BLOCK_BYTES", block)
        patch.setattr(reads, "VERBATIM_BYTES", block)
        jobs = planned(plan)
    at = 1000 + 3 * SLOT
    for job in jobs:
        assert (job.offset, job.region_offset) == (at, at - 1000 - 3 * SLOT)
        assert job.size_bytes <= max(block, SLOT)
        at += job.size_bytes
    assert at == 1000 + 3 * SLOT + count * SLOT


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=8),
    begin=st.integers(0, 1000),
)
def test_factors_are_aligned_and_do_not_overlap_each_other_or_what_is_before_them(
    sizes: list[tuple[int, int, int]], begin: int
) -> None:
    factors = tuple(DeviceFactor(*shape, pieces=()) for shape in sizes)
    (placed,), end = place_factors([Assembly(factors, (), (), 0)], 2, begin)
    free_from = begin
    for each, shape in zip(placed, sizes, strict=True):
        assert each.shape == shape
        assert each.offset % 256 == 0
        assert each.offset >= free_from
        free_from = each.offset + 2 * shape[0] * shape[1] * shape[2]
    assert end == free_from
