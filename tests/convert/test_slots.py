"""Each expert's slot of each stack, found in the shard files by their plan."""

from __future__ import annotations

import pytest

from lorashard.convert.slots import find_slots, inputs_that_may_be_equal, stack_dtypes_in
from lorashard.shards.placement import Placement
from lorashard.shards.plan import Target, build_plan
from tests.layouts import built
from tests.strategies import layout_of
from tests.tiny import MODULE

# Expert 0 is redundant.
PLACEMENT = Placement("explicit", 4, ((2, 0), (1, 0, 3), ()), {})


def test_a_slot_is_where_the_plan_put_the_expert() -> None:
    layout = layout_of(built("L10"))
    plan = build_plan(layout, PLACEMENT, None)
    slots = find_slots(layout, PLACEMENT, plan)[f"{MODULE}.up_proj.lora_A"]
    begins = [file.begins.get(f"{MODULE}.up_proj.lora_A") for file in plan.files]
    size = 2 * 6 * 4  # [r, hidden] in F32
    assert slots == {
        2: Target(1, begins[1]), 0: Target(1, begins[1] + size),
        1: Target(2, begins[2]), 3: Target(2, begins[2] + 2 * size),
    }  # fmt: skip


def test_a_shared_stack_has_one_slot_for_every_expert() -> None:
    layout = layout_of(built("L8"))
    plan = build_plan(layout, PLACEMENT, None)
    name = f"{MODULE}.down_proj.lora_B"
    slots = find_slots(layout, PLACEMENT, plan)[name]
    assert slots == dict.fromkeys(range(4), Target(0, plan.files[0].begins[name]))


def test_a_cast_changes_the_dtype_and_the_size_of_slots() -> None:
    layout = layout_of(built("L10"))
    plan = build_plan(layout, PLACEMENT, "BF16")
    name = f"{MODULE}.up_proj.lora_A"
    assert stack_dtypes_in(plan)[name] == "BF16"
    slots = find_slots(layout, PLACEMENT, plan)[name]
    assert slots[0].offset - slots[2].offset == 2 * 6 * 2


@pytest.mark.parametrize(("layout", "modules"), [("L10", [MODULE]), ("L14", [])])
def test_only_gate_and_up_of_their_own_may_have_equal_inputs(layout: str, modules: list) -> None:
    pairs = list(inputs_that_may_be_equal(layout_of(built(layout))))
    assert [module for module, _, _ in pairs] == modules
    assert all(
        gate.projection == "gate_proj" and up.projection == "up_proj" for _, gate, up in pairs
    )
