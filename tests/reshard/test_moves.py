"""Every byte of the old files is read once, front to back, and fills one place of each new copy."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.adapter.modules import FactorStack
from lorashard.reshard.moves import MovePlan, Stretch, plan_moves
from lorashard.shards.placement import (
    Placement,
    explicit_placement,
    linear_placement,
    place_experts,
)
from lorashard.shards.plan import CopyRange, ShardPlan, Target, build_plan
from tests.adapters import Spec, build
from tests.plans import destinations
from tests.strategies import layout_of, rank_lists, specs

run = settings(max_examples=60, deadline=None)
Case = tuple[Spec, Placement, Placement, "str | None"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spec = draw(specs())
    placements = []
    for _ in range(2):
        ep_size = draw(st.integers(1, 6))
        ranks = draw(rank_lists(spec.num_experts, ep_size))
        placements.append(explicit_placement({"ranks": ranks}, spec.num_experts, ep_size))
    return spec, *placements, draw(st.sampled_from([None, None, "F16", "F32", "BF16"]))


def planned(
    spec: Spec, before: Placement, after: Placement, dtype: str | None = None
) -> tuple[ShardPlan, MovePlan]:
    layout = layout_of(build(spec))
    old, new = build_plan(layout, before, dtype), build_plan(layout, after, dtype)
    return old, plan_moves(layout, old, before, new, after)


@given(case=cases())
@run
def test_the_stretches_pass_through_each_old_file_front_to_back(case: Case) -> None:
    old, moves = planned(*case)
    for number, file in enumerate(old.files):
        own = [(s.begin, s.end) for s in moves.stretches if s.file == number]
        edges = [(0, len(file.header)), *own, (file.size_bytes, file.size_bytes)]
        assert all(a[1] == b[0] for a, b in pairwise(edges)), file.name


@given(case=cases())
@run
def test_the_reads_cover_the_stretches_in_order(case: Case) -> None:
    _, moves = planned(*case)
    end = sum(stretch.end - stretch.begin for stretch in moves.stretches)
    edges = [(0, 0), *((op.begin, op.end) for op in moves.plan.reads), (end, end)]
    assert all(a[1] == b[0] for a, b in pairwise(edges))


@given(case=cases())
@run
def test_destinations_tile_every_new_file_without_hole_or_overlap(case: Case) -> None:
    _, moves = planned(*case)
    for file, regions in zip(moves.plan.files, destinations(moves.plan), strict=True):
        edges = [(0, len(file.header)), *regions, (file.size_bytes, file.size_bytes)]
        assert all(a[1] == b[0] for a, b in pairwise(edges)), file.name


def test_a_second_copy_of_an_expert_is_read_and_goes_nowhere() -> None:
    spec = Spec(num_experts=2)
    twice = explicit_placement([[0, 1], [1]], 2, 2)
    old, moves = planned(spec, twice, linear_placement(2, 1))
    aside = [op for op in moves.plan.reads if isinstance(op, CopyRange) and not op.targets]
    assert sum(op.end - op.begin for op in aside) == sum(e.size_bytes for e in old.files[2].tensors)


def test_an_expert_is_read_once_for_all_its_new_copies() -> None:
    spec = Spec(num_experts=2)
    _, moves = planned(spec, linear_placement(2, 1), explicit_placement([[0, 1], [1]], 2, 2))
    assert max(len(op.targets) for op in moves.plan.reads if isinstance(op, CopyRange)) == 2


def test_files_that_stay_as_they_are_are_one_copy_each() -> None:
    same = linear_placement(4, 1)
    _, moves = planned(Spec(extras=True), same, same)
    assert len(moves.plan.reads) == len(moves.stretches) == 2


def test_the_places_of_each_factor_that_is_there_several_times_are_named_once() -> None:
    twice = explicit_placement([[0, 1], [1]], 2, 2)
    old, moves = planned(Spec(num_experts=2), twice, linear_placement(2, 1))
    expected = [
        (Stretch(1, first.begin + size, first.begin + 2 * size), Stretch(2, copy.begin, copy.end))
        for first, copy in zip(old.files[1].tensors, old.files[2].tensors, strict=True)
        for size in [copy.end - copy.begin]
    ]
    assert sorted(moves.copies, key=lambda places: places[0].begin) == expected


def test_what_is_there_once_has_no_copies() -> None:
    _, moves = planned(Spec(), linear_placement(4, 2), linear_placement(4, 1))
    assert moves.copies == ()


def _stacks(spec: Spec) -> list[FactorStack]:
    return [stack for module in layout_of(build(spec)).modules for stack in module.stacks]


def test_a_layer_with_a_placement_of_its_own_stays_where_it_is() -> None:
    spec = Spec(num_experts=2, num_layers=2, extras=True)
    ranks: dict[str, object] = {"ranks": [[0], [1]], "layers": {"1": [[1], [0]]}}
    own = place_experts(layout_of(build(spec)), 2, "linear", ranks)
    assert len({own.ranks_of(stack.module) for stack in _stacks(spec)}) == 2
    _, moves = planned(spec, own, own)
    position, begins = 0, {}
    for stretch in moves.stretches:
        begins[position] = Target(stretch.file, stretch.begin)
        position += stretch.end - stretch.begin
    assert {op.begin: op.targets for op in moves.plan.reads if isinstance(op, CopyRange)} == {
        begin: (target,) for begin, target in begins.items()
    }
