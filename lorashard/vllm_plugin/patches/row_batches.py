"""LoRA stacks whose rows are to go from rank to rank, in which memory, and as many at a time as it holds.

Out: what `row_exchange` sends in one message from each rank to each other. All ranks find the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.vllm_plugin.load.expert_moves import ExpertMoves
from lorashard.vllm_plugin.patches.row_tables import LayerTables

SEND_BYTES = 1 << 28  # about how much a rank puts together at a time in memory made for it


@dataclass(frozen=True, slots=True)
class MovingLayer:
    """A layer whose rows are to be exchanged."""

    rows: LayerTables
    moves: ExpertMoves

    @property
    def most_sent_bytes(self) -> int:
        """What the busiest rank sends of a slot."""
        return self.moves.most_sent * self.rows.row_bytes


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory on the device for rows on their way, one dimension each, of the tables' type.

    leaving: for messages to other ranks; without it they get memory of their own.
    """

    arriving: Any
    leaving: Any = None

    @property
    def send_bytes(self) -> int:
        """About how much a rank puts together at a time."""
        return SEND_BYTES if self.leaving is None else int(self.leaving.nbytes)


def room_for(layers: Iterable[MovingLayer], num_slots: int) -> int:
    """Values of what can arrive for these layers, the same on all ranks."""
    return num_slots * sum(layer.rows.values_of_a_slot for layer in layers)


def workspace_in(buffers: Sequence[Any], dtype: Any) -> Workspace | None:
    """The two largest of some tensors that nothing is kept in now; None if there are not so many."""
    import torch

    usable = [each for each in buffers if each.is_contiguous() and _has_whole_values(each, dtype)]
    usable.sort(key=lambda each: int(each.nbytes), reverse=True)
    if len(usable) < 2:
        return None
    return Workspace(*(each.view(-1).view(torch.uint8).view(dtype) for each in usable[:2]))


def _has_whole_values(tensor: Any, dtype: Any) -> bool:
    """Whether its memory begins and ends where values of this type do."""
    begin = tensor.storage_offset() * tensor.element_size()
    return not any(at % dtype.itemsize for at in (begin, tensor.data_ptr(), tensor.nbytes))


def batches_of(
    layers: Sequence[MovingLayer], num_slots: int, space: Workspace
) -> Iterator[list[MovingLayer]]:
    """The layers, as many at a time as there is space for, the same on all ranks.

    One layer has to fit into what arrives.
    """
    room = len(space.arriving)
    batch: list[MovingLayer] = []
    num_values = num_bytes = 0
    for layer in layers:
        of_layer, sent = room_for([layer], num_slots), num_slots * layer.most_sent_bytes
        if batch and (num_values + of_layer > room or num_bytes + sent > space.send_bytes):
            yield batch
            batch, num_values, num_bytes = [], 0, 0
        batch.append(layer)
        num_values += of_layer
        num_bytes += sent
    if batch:
        yield batch


def slot_groups(slots: Sequence[int], slot_bytes: int, most: int) -> Iterator[tuple[int, ...]]:
    """The slots, as many at a time as fit into a message of `most` bytes; one at least."""
    count = max(1, most // max(1, slot_bytes))
    for first in range(0, len(slots), count):
        yield tuple(slots[first : first + count])
