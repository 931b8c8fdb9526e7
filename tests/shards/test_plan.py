"""Every byte of every output file is decided once, from every source byte read once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import PlacementError, ShardError
from lorashard.shards.names import rank_file_name
from lorashard.shards.placement import Placement, explicit_placement, linear_placement
from lorashard.shards.plan import CopyRange, Rearrange, ShardPlan, Target, build_plan
from lorashard.writing.blocks import CopyBlock, split_into_blocks
from lorashard.writing.digest import find_milestones
from tests.adapters import Spec, build
from tests.strategies import index_of, layout_of, rank_lists, specs

run = settings(max_examples=60, deadline=None)
Region = tuple[int, int]


@st.composite
def plans(draw: st.DrawFn, **of_specs: Any) -> tuple[Spec, Placement, str | None]:
    spec = draw(specs(**of_specs))
    ep_size = draw(st.integers(1, 6))
    ranks = draw(rank_lists(spec.num_experts, ep_size))
    placement = explicit_placement({"ranks": ranks}, spec.num_experts, ep_size)
    return spec, placement, draw(st.sampled_from([None, None, "F16", "F32", "BF16"]))


def planned(spec: Spec, placement: Placement, dtype: str | None) -> ShardPlan:
    return build_plan(layout_of(build(spec)), placement, dtype)


def one_plan(layout: str = "L1", ep_size: int = 2, dtype: str | None = None) -> ShardPlan:
    return planned(Spec(layout, extras=True), linear_placement(4, ep_size), dtype)


def destinations(plan: ShardPlan) -> list[list[Region]]:
    """Per file, the regions that the plan says are filled."""
    filled: list[list[Region]] = [[] for _ in plan.files]
    for op in plan.reads:
        slots = (op.targets,) if isinstance(op, CopyRange) else op.targets
        size = op.end - op.begin if isinstance(op, CopyRange) else op.slot_bytes
        for target in (target for targets in slots for target in targets):
            filled[target.file].append((target.offset, target.offset + size))
    for zero in plan.zeros:
        filled[zero.target.file].append((zero.target.offset, zero.target.offset + zero.size_bytes))
    return [sorted(regions) for regions in filled]


@given(case=plans())
@run
def test_destinations_tile_every_file_without_hole_or_overlap(case):
    plan = planned(*case)
    for file, regions in zip(plan.files, destinations(plan), strict=True):
        edges = [(0, len(file.header)), *regions, (file.size_bytes, file.size_bytes)]
        assert all(a[1] == b[0] for a, b in pairwise(edges)), file.name


@given(case=plans())
@run
def test_every_source_byte_is_read_once_in_order(case):
    plan = planned(*case)
    index = index_of(build(case[0]))
    edges = [
        (index.data_begin, index.data_begin),
        *((op.begin, op.end) for op in plan.reads),
        (index.file_size, index.file_size),
    ]
    assert all(a[1] == b[0] for a, b in pairwise(edges))


@given(case=plans())
@run
def test_the_same_input_gives_the_same_plan(case):
    assert planned(*case) == planned(*case)


@given(case=plans())
@run
def test_each_tensor_has_a_slot_for_each_expert_of_its_rank(case):
    placement = case[1]
    plan = planned(*case)
    for ep_rank, file in enumerate(plan.files[1:]):
        assert file.name == rank_file_name(ep_rank, placement.ep_size)
        assert all(e.shape[0] == len(placement.ranks[ep_rank]) for e in file.tensors)


@given(case=plans())
@run
def test_a_cast_decides_the_dtype_of_every_float_tensor(case):
    spec, placement, dtype = case
    plan = planned(spec, placement, dtype)
    source = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
    expected = {dtype or source.get(spec.dtype, "F16")}
    found = {entry.dtype for file in plan.files for entry in file.tensors}
    assert found == expected


@given(case=plans(), block_bytes=st.integers(1, 300), column_bytes=st.integers(1, 300))
@run
def test_blocks_cover_the_reads_in_source_order(case, block_bytes, column_bytes):
    plan = planned(*case)
    blocks = list(split_into_blocks(plan.reads, block_bytes, column_bytes))
    assert all(a.end == b.begin for a, b in pairwise(blocks))
    assert (blocks[0].begin, blocks[-1].end) == (plan.reads[0].begin, plan.reads[-1].end)


@given(case=plans(), block_bytes=st.integers(1, 300), column_bytes=st.integers(1, 300))
@run
def test_no_block_is_larger_than_its_limit_or_one_index(case, block_bytes, column_bytes):
    for block in split_into_blocks(planned(*case).reads, block_bytes, column_bytes):
        size = block.end - block.begin
        if isinstance(block, CopyBlock):
            assert size <= block_bytes
        else:
            limit = column_bytes if block.op.axes[0] == "c" else block_bytes
            assert size <= limit or block.last - block.first == 1


@given(case=plans(), block_bytes=st.integers(1, 300))
@run
def test_the_copies_of_a_block_fill_it(case, block_bytes):
    for block in split_into_blocks(planned(*case).reads, block_bytes):
        if isinstance(block, CopyBlock):
            edges = [(0, block.begin), *((c.begin, c.end) for c in block.copies), (block.end, 0)]
            assert all(a[1] == b[0] for a, b in pairwise(edges))


@given(case=plans(), block_bytes=st.integers(1, 300))
@run
def test_cut_copies_still_reach_the_same_places(case, block_bytes):
    plan = planned(*case)
    whole = {
        (begin, Target(target.file, target.offset + begin - op.begin))
        for op in plan.reads if isinstance(op, CopyRange)
        for begin in range(op.begin, op.end) for target in op.targets
    }  # fmt: skip
    cut = {
        (begin, Target(target.file, target.offset + begin - copy.begin))
        for block in split_into_blocks(plan.reads, block_bytes) if isinstance(block, CopyBlock)
        for copy in block.copies
        for begin in range(copy.begin, copy.end) for target in copy.targets
    }  # fmt: skip
    assert cut == whole


@given(case=plans())
@run
def test_milestones_ascend_to_the_end_of_the_file(case):
    plan = planned(*case)
    for file, milestones in zip(plan.files, find_milestones(plan), strict=True):
        assert all(
            a.source_end < b.source_end and a.dest_end < b.dest_end for a, b in pairwise(milestones)
        )
        assert milestones[-1].dest_end == file.size_bytes


@given(case=plans())
@run
def test_a_milestone_comes_when_the_last_byte_before_it_is_there(case):
    plan = planned(*case)
    for number, milestones in enumerate(find_milestones(plan)):
        for milestone in milestones:
            needed = [0]
            for op in plan.reads:
                slots = (op.targets,) if isinstance(op, CopyRange) else op.targets
                places = [t.offset for targets in slots for t in targets if t.file == number]
                if any(offset < milestone.dest_end for offset in places):
                    needed.append(op.end)
            assert milestone.source_end == max(needed)


def test_per_expert_factors_are_copied_without_a_rearrangement():
    assert all(isinstance(op, CopyRange) for op in one_plan("L1").reads)


def test_neighbours_in_source_and_output_are_one_copy():
    assert len(one_plan("L10", ep_size=1).reads) < len(one_plan("L10", ep_size=4).reads)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [("L2", {"rce"}), ("L6", {"rec"}), ("L3", {"cre", "ecr"}), ("L7", {"cer", "ecr"}), ("L13", {"ecr"})],
)  # fmt: skip
def test_a_fused_factor_is_rearranged_by_the_axes_of_its_layout(layout: str, axes: set[str]):
    assert {op.axes for op in one_plan(layout).reads if isinstance(op, Rearrange)} == axes


def test_a_cast_to_the_same_dtype_copies():
    assert one_plan(dtype="F32") == one_plan()


def test_a_redundant_expert_is_read_once_and_written_to_each_copy():
    spec = Spec(num_experts=2)
    plan = planned(spec, explicit_placement([[0, 1], [1]], 2, 2), None)
    assert max(len(op.targets) for op in plan.reads) == 2


def test_an_untrained_expert_is_zeros_of_its_slots_size():
    adapter = build(Spec(experts=(0, 1, 3)))
    plan = build_plan(layout_of(adapter), linear_placement(4, 1), None)
    slots = [prod_bytes(adapter.factors[key][m]) for key in adapter.factors for m in (0, 1)
             if key[1] == 0]  # fmt: skip
    assert sorted(zero.size_bytes for zero in plan.zeros) == sorted(slots)


def prod_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * ELEMENT_SIZE["F32"]


def test_a_rank_without_experts_has_tensors_without_rows():
    plan = planned(Spec(num_experts=2), linear_placement(2, 3), None)
    assert {entry.shape[0] for entry in plan.files[3].tensors} == {0}


def test_an_adapter_without_replicated_tensors_has_an_empty_replicated_file():
    plan = planned(Spec(), linear_placement(4, 2), None)
    assert plan.files[0].size_bytes == len(plan.files[0].header)


def test_a_layer_s_own_placement_decides_its_slots():
    layers = {"model.layers.1.mlp.experts": ((3,), (0, 1, 2))}
    placement = replace(linear_placement(4, 2), layers=layers)
    plan = planned(Spec(num_layers=2), placement, None)
    counts = {e.name.split(".")[2]: e.shape[0] for e in plan.files[1].tensors}
    assert counts == {"0": 2, "1": 1}


def test_a_placement_of_another_number_of_experts_is_refused():
    with pytest.raises(PlacementError, match="for 5 experts, the adapter has 4"):
        planned(Spec(), linear_placement(5, 2), None)


def test_a_replicated_tensor_with_a_shared_factor_s_name_is_refused():
    layout = layout_of(build(Spec("L8", extras=True)))
    shared = next(s for m in layout.modules for s in m.stacks if s.shared)
    clash = layout.replicated[0]._replace(name=shared.name)
    with pytest.raises(ShardError, match="Two tensors would be called"):
        build_plan(replace(layout, replicated=(clash,)), linear_placement(4, 2), None)
