"""AdapterLayout x the experts of one rank -> PlainPlan: what the rank reads of a plain adapter. Pure.

The plan of `lorashard split`, without the other ranks' experts: their bytes are not read at all
where each expert has tensors of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lorashard.adapter.layout import AdapterLayout
from lorashard.header import TensorEntry
from lorashard.shards.placement import Placement
from lorashard.shards.plan import CopyRange, ShardPlan, build_plan
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import ModuleContents, Rearrangement
from lorashard.vllm_plugin.load.planned_file import FileMap, map_files

_OWN = 1  # of the plan's three files: the replicated one, this rank's, and the others'

# A module of the adapter -> this rank's global experts of it, in slot order.
LocalExperts = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """What one rank reads of an adapter, and from where. No values, and nothing of its place.

    local_experts: module -> global ids in slot order. dense: entries of the replicated file.
    rearranged: the stacks that are nothing but what `rearrangements` fill.
    """

    local_experts: Mapping[str, tuple[int, ...]]
    num_experts: int
    modules: tuple[ModuleContents, ...]
    dense: tuple[TensorEntry, ...]
    replicated: FileMap
    own: FileMap
    rearrangements: tuple[Rearrangement, ...]
    rearranged: frozenset[str]


def plan_plain(layout: AdapterLayout, local_experts: LocalExperts) -> PlainPlan:
    """Decide what is read for this rank."""
    own = {module.name: local_experts(module.name) for module in layout.modules}
    placement = _own_and_other_experts(own, layout.num_experts)
    plan = build_plan(layout, placement, None)
    replicated, of_rank = map_files(plan, _OWN + 1)
    modules = module_contents(layout, placement)
    rearrangements = tuple(_rearrangements(plan))
    names = layout.replicated_names
    return PlainPlan(
        own,
        layout.num_experts,
        modules,
        tuple(entry for entry in plan.files[0].tensors if entry.name in names),
        replicated,
        of_rank,
        rearrangements,
        _filled(modules, rearrangements),
    )


def _own_and_other_experts(own: Mapping[str, tuple[int, ...]], num_experts: int) -> Placement:
    """A placement on two ranks: the experts of this rank, and all others."""
    layers = {
        module: (experts, tuple(sorted(set(range(num_experts)).difference(experts))))
        for module, experts in own.items()
    }
    return Placement("explicit", num_experts, next(iter(layers.values())), layers)


def module_contents(layout: AdapterLayout, placement: Placement) -> tuple[ModuleContents, ...]:
    """What rank 0 of a placement gets of each experts container, as one rank file has it."""
    return tuple(
        ModuleContents(
            module.name,
            module.gate_up,
            module.scaling,
            tuple(
                ShardStack(s.name, s.projection, s.matrix, s.dtype, s.rows, s.cols, s.shared)
                for s in module.stacks
            ),
            placement.ranks_of(module.name)[:1],
        )
        for module in layout.modules
    )


def _rearrangements(plan: ShardPlan) -> Iterator[Rearrangement]:
    """Those of which this rank has a slot."""
    entries = plan.files[_OWN].tensors
    begins = [entry.begin for entry in entries]
    for op in plan.reads:
        if isinstance(op, CopyRange):
            continue
        places = [
            next((target.offset for target in targets if target.file == _OWN), None)
            for targets in op.targets
        ]
        own = [place for place in places if place is not None]
        if own:
            entry = entries[bisect_right(begins, own[0]) - 1]
            slots = tuple(
                None if place is None else (place - entry.begin) // op.slot_bytes
                for place in places
            )
            yield Rearrangement(entry.name, op, slots)


def _filled(
    modules: tuple[ModuleContents, ...], rearrangements: tuple[Rearrangement, ...]
) -> frozenset[str]:
    """The stacks of which rearrangements fill every byte."""
    num_filled: dict[str, int] = {}
    for each in rearrangements:
        if (each.op.rows, each.op.cols) == (each.op.slot_rows, each.op.slot_cols):
            count = sum(slot is not None for slot in each.slots)
            num_filled[each.stack] = num_filled.get(each.stack, 0) + count
    return frozenset(
        stack.name
        for module in modules
        for stack in module.stacks
        if num_filled.get(stack.name) == len(module.ranks[0])
    )
