"""Rows of the LoRA stacks go from rank to rank: a message from each rank to each other for some layers.

A message has, layer by layer and stack by stack, the rows of its experts, those of all slots that travel
side by side. With a message for each expert, as vLLM sends the base weights, sending them took longer
than the base weights themselves, which are 30 times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from lorashard.vllm_plugin.load.expert_moves import ExpertMoves
from lorashard.vllm_plugin.patches.row_batches import (
    MovingLayer,
    Workspace,
    room_for,
    slot_groups,
)

_LIMIT = timedelta(minutes=5)  # for which a rank waits for the others, where all come at once


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Rows of one layer that have come, of some slots.

    blocks: by the rank that they come from, for each stack, [received[rank] * len(slots), values].
    """

    slots: tuple[int, ...]
    blocks: tuple[tuple[Any, ...], ...]


def exchange_rows(
    layers: Sequence[MovingLayer],
    slots: Sequence[int],
    rank: int,
    communicator: Any,
    space: Workspace,
) -> list[list[Arrivals]]:
    """Send this rank's rows, and get those of others, on all ranks at once: for each layer, what comes.

    communicator: vLLM's, for transfers of EPLB. space: for room_for(layers, len(slots)) values to arrive
    at least. On the current stream, on which the communicator has to be, too.
    """
    arrivals: list[list[Arrivals]] = [[] for _ in layers]
    begin = 0
    slot_bytes = sum(layer.most_sent_bytes for layer in layers)
    for group in slot_groups(slots, slot_bytes, space.send_bytes):
        end = begin + room_for(layers, len(group))
        part = replace(space, arriving=space.arriving[begin:end])
        for of_layer, arrived in zip(
            arrivals, _exchange(layers, group, rank, communicator, part), strict=True
        ):
            of_layer.append(arrived)
        begin = end
    return arrivals


def put_rows(layers: Sequence[MovingLayer], arrivals: Sequence[Sequence[Arrivals]]) -> None:
    """What has arrived for each layer goes into its stacks. layers: one at least."""
    numbers = _RowNumbers()
    puts: list[tuple[MovingLayer, tuple[Any, ...], slice, slice | None]] = []
    for layer, of_layer in zip(layers, arrivals, strict=True):
        for arrived in of_layer:
            for blocks, targets in zip(arrived.blocks, _targets_by_rank(layer.moves), strict=True):
                if not targets:
                    continue
                into = numbers.add(layer, arrived.slots, [slots[0] for slots in targets])
                puts.append((layer, blocks, into, None))
                again = [(row, slot) for row, slots in enumerate(targets) for slot in slots[1:]]
                if again:
                    into = numbers.add(layer, arrived.slots, [slot for _, slot in again])
                    rows = numbers.add_rows(len(arrived.slots), [row for row, _ in again])
                    puts.append((layer, blocks, into, rows))
    on_device = numbers.on(layers[0].rows.tables[0].device)
    for layer, blocks, where, taken in puts:
        places = on_device[where]
        chosen = None if taken is None else on_device[taken]
        for table, block in zip(layer.rows.tables, blocks, strict=True):
            table.index_copy_(0, places, block if chosen is None else block.index_select(0, chosen))


def _exchange(
    layers: Sequence[MovingLayer],
    slots: tuple[int, ...],
    rank: int,
    communicator: Any,
    space: Workspace,
) -> list[Arrivals]:
    room = space.arriving
    ranks = range(len(layers[0].moves.sent))
    incoming: list[list[list[Any]]] = []  # by the rank that they come from, and layer
    end = 0
    for peer in ranks:
        begin = end
        counts = [layer.moves.received[peer] * len(slots) for layer in layers]
        incoming.append(_blocks_of_layers(room[begin:], layers, counts))
        end += _num_values(layers, counts)
        if peer != rank and begin < end:
            communicator.add_recv([_on_wire(room[begin:end])], peer, expert_id=0)
    messages = _outgoing(layers, slots, incoming[rank], rank, space)
    for peer, into in zip(ranks, messages, strict=True):
        if peer != rank and into is not None:
            communicator.add_send([_on_wire(into)], peer, expert_id=0)
    communicator.execute()
    return [
        Arrivals(slots, tuple(tuple(blocks[place]) for blocks in incoming))
        for place in range(len(layers))
    ]


def _outgoing(
    layers: Sequence[MovingLayer],
    slots: tuple[int, ...],
    stay: Sequence[Sequence[Any]],
    rank: int,
    space: Workspace,
) -> list[Any]:
    """The message to each rank, if it gets any; for the own rank, what stays is copied into `stay`."""
    import torch

    numbers = _RowNumbers()
    ranks = range(len(layers[0].moves.sent))
    rows = [
        [numbers.add(layer, slots, layer.moves.sent[peer]) for layer in layers] for peer in ranks
    ]
    on_device = numbers.on(space.arriving.device)
    messages = []
    free = space.arriving[:0] if space.leaving is None else space.leaving
    for peer in ranks:
        counts = [where.stop - where.start for where in rows[peer]]
        size = _num_values(layers, counts)
        message = None
        if peer != rank and size:
            message = free[:size] if size <= len(free) else free.new_empty(size)
            free = free[size:]
        into = stay if message is None else _blocks_of_layers(message, layers, counts)
        for layer, where, blocks in zip(layers, rows[peer], into, strict=True):
            if where.start < where.stop:
                places = on_device[where]
                for table, block in zip(layer.rows.tables, blocks, strict=True):
                    torch.index_select(table, 0, places, out=block)
        messages.append(message)
    return messages


class _RowNumbers:
    """Numbers of rows, put together on the host to be copied to the device at once."""

    def __init__(self) -> None:
        self._all: list[int] = []

    def add(self, layer: MovingLayer, slots: Sequence[int], experts: Sequence[int]) -> slice:
        """Of these experts, each in all the slots, in the stacks as tables. Where they are."""
        begins = [slot * layer.rows.num_local for slot in slots]
        return self._extend([begin + expert for expert in experts for begin in begins])

    def add_rows(self, num_slots: int, rows: Sequence[int]) -> slice:
        """The same in a block, in which the slots of a row lie side by side."""
        return self._extend([row * num_slots + at for row in rows for at in range(num_slots)])

    def on(self, device: Any) -> Any:
        """All of them, without waiting for what the device is busy with.

        Not from pinned memory: what little there is CUDA takes along with the command, and pinning waits.
        """
        import torch

        return torch.tensor(self._all, dtype=torch.int64).to(device, non_blocking=True)

    def _extend(self, numbers: Sequence[int]) -> slice:
        begin = len(self._all)
        self._all.extend(numbers)
        return slice(begin, len(self._all))


def _targets_by_rank(moves: ExpertMoves) -> Iterator[tuple[tuple[int, ...], ...]]:
    begin = 0
    for count in moves.received:
        yield moves.targets[begin : begin + count]
        begin += count


def _num_values(layers: Sequence[MovingLayer], counts: Sequence[int]) -> int:
    return sum(count * layer.rows.row_width for layer, count in zip(layers, counts, strict=True))


def _blocks_of_layers(
    memory: Any, layers: Sequence[MovingLayer], counts: Sequence[int]
) -> list[list[Any]]:
    """Parts of the memory from its beginning on: for each stack of each layer, [count, values]."""
    blocks, begin = [], memory.storage_offset()
    for layer, count in zip(layers, counts, strict=True):
        of_layer = []
        for width in layer.rows.widths:
            of_layer.append(memory.as_strided((count, width), (width, 1), begin))
            begin += count * width
        blocks.append(of_layer)
    return blocks


def _on_wire(message: Any) -> Any:
    """As values of a type that every communicator sends."""
    import torch

    return message.view(torch.uint8)


def communicator_like(given: Any, cpu_group: Any, device: Any, stream: Any) -> Any:
    """EPLB's own communicator, or another if that one sends nothing but what vLLM has registered."""
    if type(given).__name__ != "NixlEplbCommunicator":
        return given
    found = staged_communicator(cpu_group, device)
    found.set_stream(stream)
    return found


def staged_communicator(cpu_group: Any, device: Any) -> Any:
    """VLLM's communicator that sends through host memory, apart from EPLB's own."""
    from vllm.distributed.eplb import eplb_communicator

    if device.type == "cpu":
        return eplb_communicator.TorchDistNcclEplbCommunicator(cpu_group)  # plain send and receive
    return eplb_communicator.TorchDistGlooStagedEplbCommunicator(cpu_group)


def all_gather_numbers(numbers: Sequence[int], group: Any) -> list[list[int]]:
    """What each rank says. Raises RuntimeError if one of them has not come in time."""
    return say_numbers(numbers, group)()


def say_numbers(numbers: Sequence[int], group: Any) -> Callable[[], list[list[int]]]:
    """The same without waiting: a function that waits."""
    import torch
    import torch.distributed as dist

    own = torch.tensor(numbers, dtype=torch.int64)
    said = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(said, own, group, async_op=True)

    def hear() -> list[list[int]]:
        work.wait(_LIMIT)
        return [each.tolist() for each in said]

    return hear
