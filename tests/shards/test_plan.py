"""Every byte of every output file is decided once, from every source byte read once."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import PlacementError, ShardError
from lorashard.header import TensorEntry
from lorashard.shards.names import rank_file_name
from lorashard.shards.placement import explicit_placement, linear_placement
from lorashard.shards.plan import CopyRange, Rearrange, ShardPlan, Target, _whole_tensor, build_plan
from tests.adapters import Spec, build
from tests.plans import destinations, one_plan, planned, plans, run
from tests.strategies import index_of, layout_of


def assert_tiles_its_files(plan: ShardPlan) -> None:
    for file, regions in zip(plan.files, destinations(plan), strict=True):
        edges = [(0, len(file.header)), *regions, (file.size_bytes, file.size_bytes)]
        assert all(a[1] == b[0] for a, b in pairwise(edges)), file.name


@given(case=plans())
@run
def test_destinations_tile_every_file_without_hole_or_overlap(case):
    assert_tiles_its_files(planned(*case))


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
    assert_tiles_its_files(plan)


def test_a_placement_of_another_number_of_experts_is_refused():
    with pytest.raises(PlacementError, match="for 5 experts, the adapter has 4"):
        planned(Spec(), linear_placement(5, 2), None)


def test_a_replicated_tensor_with_a_shared_factor_s_name_is_refused():
    layout = layout_of(build(Spec("L8", extras=True)))
    shared = next(s for m in layout.modules for s in m.stacks if s.shared)
    other, clash = layout.replicated[0], layout.replicated[1]._replace(name=shared.name)
    with pytest.raises(ShardError) as caught:
        build_plan(replace(layout, replicated=(other, clash)), linear_placement(4, 2), None)
    assert caught.value.message == (
        f"Two tensors would be called {shared.name} in replicated.safetensors."
    )
    assert caught.value.hint == "Rename the one in the adapter that is not an expert factor."


def test_each_file_has_its_name_and_says_of_which_rank_it_is():
    files = one_plan(ep_size=2).files
    assert [file.name for file in files] == [
        "replicated.safetensors", "ep-00000-of-00002.safetensors", "ep-00001-of-00002.safetensors",
    ]  # fmt: skip
    assert [json.loads(file.header[8:])["__metadata__"] for file in files] == [
        {"format": "pt"},
        {"format": "pt", "ep_rank": "0", "ep_size": "2"},
        {"format": "pt", "ep_rank": "1", "ep_size": "2"},
    ]


def test_a_factor_of_a_smaller_r_is_put_into_the_larger_slot():
    adapter = build(Spec(num_experts=2, lora_ranks={1: 1}))
    plan = build_plan(layout_of(adapter), linear_placement(2, 1), None)
    sources = {entry.begin: entry for entry in index_of(adapter).tensors}
    padded = [op for op in plan.reads if isinstance(op, Rearrange)]
    assert len(padded) == 3
    for op in padded:
        assert (op.rows, op.cols) == sources[op.begin].shape
        assert (op.slot_rows, op.slot_cols) == (op.rows, 2)
        assert (op.source_dtype, op.dtype, op.end) == ("F32", "F32", sources[op.begin].end)


def test_an_expert_of_r_0_is_zeros_once():
    adapter = build(Spec(num_experts=2, lora_ranks={1: 0}))
    plan = build_plan(layout_of(adapter), linear_placement(2, 1), None)
    assert len(plan.zeros) == 6
    assert_tiles_its_files(plan)


@pytest.mark.parametrize(
    ("shape", "rows_and_cols"),
    [((6, 5), (6, 5)), ((2, 3, 5), (6, 5)), ((7,), (1, 7)), ((), (1, 1))],
)
def test_a_whole_tensor_is_cast_row_by_row(
    shape: tuple[int, ...], rows_and_cols: tuple[int, int]
) -> None:
    entry = TensorEntry("x", "F32", shape, 100, 100 + 4 * prod(shape))
    (cast,) = _whole_tensor(entry, Target(0, 8), "BF16")
    rows, cols = rows_and_cols
    assert cast == Rearrange(
        100, entry.end, "rec", rows, cols, rows, cols, "F32", "BF16", ((Target(0, 8),),)
    )
    assert isinstance(cast.rows, int)


def test_a_tensor_of_one_byte_is_copied_and_an_empty_one_is_not() -> None:
    one, empty = (TensorEntry("x", "U8", (size,), 100, 100 + size) for size in (1, 0))
    assert [*_whole_tensor(one, Target(0, 8), "U8")] == [CopyRange(100, 101, (Target(0, 8),))]
    assert [*_whole_tensor(empty, Target(0, 8), "U8")] == []


@pytest.mark.parametrize(("layout", "axes"), [("L1", "rec"), ("L10", "erc")])
def test_what_one_expert_has_is_cast_row_by_row_and_a_stack_expert_by_expert(
    layout: str, axes: str
) -> None:
    plan = planned(Spec(layout, num_experts=2), linear_placement(2, 1), "BF16")
    assert {op.axes for op in plan.reads if isinstance(op, Rearrange)} == {axes}
