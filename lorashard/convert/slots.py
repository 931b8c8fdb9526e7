"""Where the shard files hold each expert's slot of each stack, and in which dtype. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import FactorStack
from lorashard.shards.placement import Placement
from lorashard.shards.plan import ShardPlan, Target, expert_slots

# Stack name -> expert -> where its slot is; of a shared stack the one slot for every expert.
SlotTable = Mapping[str, Mapping[int, Target]]


def stack_dtypes_in(plan: ShardPlan) -> dict[str, str]:
    """The dtype of each tensor of the shard files by its name; a cast may have changed it."""
    return {entry.name: entry.dtype for file in plan.files[:2] for entry in file.tensors}


def find_slots(source: AdapterLayout, placement: Placement, plan: ShardPlan) -> SlotTable:
    """Where in the shard files each expert's slot of each stack is."""
    begins = [file.begins for file in plan.files]
    dtypes = stack_dtypes_in(plan)
    slots: dict[str, Mapping[int, Target]] = {}
    for module in source.modules:
        ranks = placement.ranks_of(module.name)
        for stack in module.stacks:
            if stack.shared:
                only_slot = Target(0, begins[0][stack.name])
                slots[stack.name] = dict.fromkeys(range(source.num_experts), only_slot)
                continue
            copies = expert_slots(stack, ranks, begins, dtypes[stack.name])
            # A redundant expert's copies are equal, so any of them will do.
            slots[stack.name] = {expert: targets[0] for expert, targets in copies.items()}
    return slots


def inputs_that_may_be_equal(
    source: AdapterLayout,
) -> Iterator[tuple[str, FactorStack, FactorStack]]:
    """(module, gate's lora_A, up's lora_A) where their shapes and dtypes are the same."""
    for module in source.modules:
        stacks = module.stacks_by_factor
        gate, up = stacks.get(("gate_proj", "lora_A")), stacks.get(("up_proj", "lora_A"))
        if gate and up and (gate.rows, gate.cols, gate.dtype) == (up.rows, up.cols, up.dtype):
            yield module.name, gate, up
