"""Plans of any adapter with any placement, for the tests of what carries them out."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from lorashard.shards.placement import Placement, explicit_placement, linear_placement
from lorashard.shards.plan import CopyRange, ShardPlan, build_plan
from tests.adapters import Spec, build
from tests.strategies import layout_of, rank_lists, specs

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
