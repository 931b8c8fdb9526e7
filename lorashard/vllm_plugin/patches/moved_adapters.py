"""Adapters in host memory whose experts have moved since they were packed.

Such an adapter is written into its slot as it is. Then its rows are moved on the GPU, from where the
experts were to where they are, and host memory gets what the slot has: no second read of its files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.engine.live import WRAPPER_3D
from lorashard.vllm_plugin.load.expert_moves import plan_moves
from lorashard.vllm_plugin.load.lora_model import is_ready, maps_of, set_maps
from lorashard.vllm_plugin.patches.row_batches import (
    SEND_BYTES,
    MovingLayer,
    Workspace,
    batches_of,
    room_for,
)
from lorashard.vllm_plugin.patches.row_exchange import (
    all_gather_numbers,
    exchange_rows,
    put_rows,
    staged_communicator,
)
from lorashard.vllm_plugin.patches.row_tables import LayerTables


def move_adapter(
    manager: Any,
    wrappers: Mapping[str, Any],
    tables: Mapping[str, LayerTables],
    model: Any,
    names: Sequence[str],
    slot: int,
    maps: ExpertMaps,
) -> None:
    """Bring the rows of these layers in a slot to where `maps` has the experts. On all ranks at once.

    wrappers, tables: of the layers, by name. The rows are where the experts were as `model`, which was
    written there, was packed.
    """
    packed = maps_of(model)
    if packed is None:
        return
    moved = [name for name in names if packed.layers[name] != maps.layers[name]]
    if not moved:
        return
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group().cpu_group
    rank, num_ranks = group.rank(), group.size()
    before, after = ([m.layers[name] for name in moved] for m in (packed, maps))
    _check_alike(group, (model.id, slot, moved, before, after))
    communicator = staged_communicator(group, manager.device)
    layers = [
        MovingLayer(tables[name], plan_moves(old, new, num_ranks, rank))
        for name, old, new in zip(moved, before, after, strict=True)
    ]
    memory = layers[0].rows.tables[0]
    most = max(SEND_BYTES // memory.element_size(), *(room_for([layer], 1) for layer in layers))
    space = Workspace(memory.new_empty(min(most, room_for(layers, 1))))
    for batch in batches_of(layers, 1, space):
        put_rows(batch, exchange_rows(batch, (slot,), rank, communicator, space))
    for name, new in zip(moved, after, strict=True):
        if _copy_back(manager, wrappers[name], model, name, slot):
            packed = packed.with_layer(name, new)
    set_maps(model, packed)


def _copy_back(manager: Any, wrapper: Any, model: Any, name: str, slot: int) -> bool:
    """Have host memory as the slot is. Whether it could be done."""
    weights = manager._get_lora_layer_weights(model, name)  # noqa: SLF001
    if weights is None:
        return True  # no rows
    if not is_ready(weights):
        return False  # of another package's making: whatever its memory is shared with
    for tensor, stack in _stacks_of(wrapper, weights):
        _, rows, cols = tensor.shape
        if tensor.shape[0] == stack.shape[1]:
            tensor.copy_(stack[slot, :, :rows, :cols])
    return True


def _stacks_of(wrapper: Any, weights: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of one layer that `set_lora` takes, and the stack that it puts each into."""
    for tensors, w13, w2 in (
        (weights.lora_a, wrapper.w13_lora_a_stacked, wrapper.w2_lora_a_stacked),
        (weights.lora_b, wrapper.w13_lora_b_stacked, wrapper.w2_lora_b_stacked),
    ):
        is_3d = type(wrapper).__name__ == WRAPPER_3D
        stacks = (w13[0], w2[0]) if is_3d else (w13[0], w2[0], w13[-1])
        yield from zip(tensors, stacks, strict=True)


def _check_alike(group: Any, what: object) -> None:
    """Raise RuntimeError unless all ranks are about to move the same."""
    said = all_gather_numbers([zlib.crc32(repr(what).encode())], group)
    if len({tuple(each) for each in said}) > 1:
        raise RuntimeError("the ranks differ in where an adapter's experts are")
