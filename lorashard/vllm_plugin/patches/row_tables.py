"""LoRA stacks of MoE layers as tables, of which one row belongs to one expert in one slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerTables:
    """The memory of one layer's LoRA stacks. num_local: experts of this rank, E_local.

    tables: [slots * E_local, width] each, of one type. widths: of each.
    """

    tables: tuple[Any, ...]
    num_local: int
    widths: tuple[int, ...]

    @property
    def row_width(self) -> int:
        """Values of one expert in one slot."""
        return sum(self.widths)

    @property
    def values_of_a_slot(self) -> int:
        """Of all of this rank's experts."""
        return self.num_local * self.row_width

    @property
    def row_bytes(self) -> int:
        """Of one expert in one slot."""
        return self.row_width * int(self.tables[0].itemsize)


def moving_stacks(wrapper: Any) -> list[Any]:
    """A layer's LoRA stacks, [slots, E_local, ...] each. What all experts share does not move."""
    stacks = [*wrapper.w13_lora_b_stacked, *wrapper.w2_lora_a_stacked]
    if not getattr(wrapper, "enable_moe_shared_loras", False):
        stacks += [*wrapper.w13_lora_a_stacked, *wrapper.w2_lora_b_stacked]
    return stacks


def tables_of(stacks_of_layers: Sequence[Sequence[Any]]) -> list[LayerTables]:
    """For each layer, its stacks, [slots, E_local, ...] each and contiguous, as tables of one type."""
    dtype = _widest_dtype([stack for stacks in stacks_of_layers for stack in stacks])
    found = []
    for stacks in stacks_of_layers:
        num_slots, num_local = stacks[0].shape[:2]
        tables = tuple(stack.view(num_slots * num_local, -1).view(dtype) for stack in stacks)
        widths = tuple(int(table.shape[1]) for table in tables)
        found.append(LayerTables(tables, num_local, widths))
    return found


def _widest_dtype(stacks: Sequence[Any]) -> Any:
    """What the values of all stacks can be taken for: by index, 2 bytes take as long to copy as 16."""
    import torch

    sizes = [
        size * stack.element_size()
        for stack in stacks
        for size in (int(stack.shape[2:].numel()), stack.storage_offset())
    ]
    for dtype in (torch.complex128, torch.int64, torch.int32):
        if all(size % dtype.itemsize == 0 for size in sizes):
            return dtype
    return stacks[0].dtype
