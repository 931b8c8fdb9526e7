"""Rows of the LoRA stacks go from rank to rank: a message from each rank to each other for each stack.

An expert's rows of all slots that travel lie side by side in a message. With a message for each expert,
as vLLM sends the base weights, sending them took longer than the base weights themselves, which are
30 times as large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lorashard.vllm_plugin.load.expert_moves import ExpertMoves

SEND_BYTES = 1 << 28  # about how much a rank puts together at a time
_LIMIT = timedelta(minutes=5)  # for which a rank waits for the others, where all come at once


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Rows that have come, of some slots. blocks: of each stack, [R * len(slots), values]."""

    slots: tuple[int, ...]
    blocks: tuple[Any, ...]


def moving_stacks(wrapper: Any) -> list[Any]:
    """A layer's LoRA stacks, [slots, E_local, ...] each. What all experts share does not move."""
    stacks = [*wrapper.w13_lora_b_stacked, *wrapper.w2_lora_a_stacked]
    if not getattr(wrapper, "enable_moe_shared_loras", False):
        stacks += [*wrapper.w13_lora_a_stacked, *wrapper.w2_lora_b_stacked]
    return stacks


def row_width(stacks: Sequence[Any]) -> int:
    """Values of one expert in one slot. stacks: [slots, E_local, ...] each, contiguous."""
    return sum(stack[0, 0].numel() for stack in stacks)


def exchange_rows(
    stacks: Sequence[Any],
    slots: Sequence[int],
    moves: ExpertMoves,
    rank: int,
    communicator: Any,
    room: Any,
) -> list[Arrivals]:
    """Send this rank's rows, and get those of others, on all ranks at once.

    stacks: of one layer. communicator: vLLM's, for transfers of EPLB. room: for what arrives, one
    dimension, at least sum(moves.received) * len(slots) * row_width(stacks) values.
    On the current stream, on which the communicator has to be, too.
    """
    others = [peer for peer in range(len(moves.sent)) if peer != rank]
    sent = [slot for peer in others for slot in moves.sent[peer]]
    num_rows, width, begin = sum(moves.received), row_width(stacks), 0
    arrivals = []
    for group in _groups(slots, moves.most_sent * width * room.element_size()):
        end = begin + num_rows * len(group) * width
        incoming = _blocks(room[begin:end], stacks, num_rows * len(group))
        begin = end
        outgoing = _blocks(
            room.new_empty(len(sent) * len(group) * width), stacks, len(sent) * len(group)
        )
        at_in = sum(moves.received[:rank]) * len(group)
        stay = [block[at_in : at_in + moves.received[rank] * len(group)] for block in incoming]
        _gather(stacks, group, sent, outgoing)
        _gather(stacks, group, moves.sent[rank], stay)
        at_out = at_in = 0
        for peer in range(len(moves.sent)):
            num_in = moves.received[peer] * len(group)
            if peer != rank:
                num_out = len(moves.sent[peer]) * len(group)
                if num_out:
                    rows = [block[at_out : at_out + num_out] for block in outgoing]
                    communicator.add_send(rows, peer, expert_id=0)
                if num_in:
                    rows = [block[at_in : at_in + num_in] for block in incoming]
                    communicator.add_recv(rows, peer, expert_id=0)
                at_out += num_out
            at_in += num_in
        communicator.execute()
        arrivals.append(Arrivals(group, tuple(incoming)))
    return arrivals


def put_rows(stacks: Sequence[Any], moves: ExpertMoves, arrivals: Sequence[Arrivals]) -> None:
    """What has arrived goes into the stacks."""
    first = [slots[0] for slots in moves.targets]
    again = [(row, slot) for row, slots in enumerate(moves.targets) for slot in slots[1:]]
    for arrived in arrivals if first else ():
        _put(stacks, arrived, first)
        if again:
            _put(stacks, arrived, [slot for _, slot in again], [row for row, _ in again])


def _groups(slots: Sequence[int], slot_bytes: int) -> Iterator[tuple[int, ...]]:
    count = max(1, SEND_BYTES // max(1, slot_bytes))
    for first in range(0, len(slots), count):
        yield tuple(slots[first : first + count])


def _gather(
    stacks: Sequence[Any], slots: Sequence[int], experts: Sequence[int], blocks: Sequence[Any]
) -> None:
    """Copy the rows of these experts. blocks: for each stack, [len(experts) * len(slots), values]."""
    import torch

    if experts:
        numbers = _row_numbers(stacks[0].shape[1], slots, experts, stacks[0].device)
        for table, block in zip(_tables(stacks), blocks, strict=True):
            torch.index_select(table, 0, numbers, out=block.view(table.dtype))


def _put(
    stacks: Sequence[Any],
    arrived: Arrivals,
    experts: Sequence[int],
    rows: Sequence[int] | None = None,
) -> None:
    """What has arrived, or some `rows` of it, becomes that of `experts`: positions in the stacks."""
    into = _row_numbers(stacks[0].shape[1], arrived.slots, experts, stacks[0].device)
    chosen = None
    if rows is not None:
        num_slots = len(arrived.slots)
        chosen = _row_numbers(1, range(num_slots), [row * num_slots for row in rows], into.device)
    for table, block in zip(_tables(stacks), arrived.blocks, strict=True):
        values = block.view(table.dtype)
        table.index_copy_(0, into, values if chosen is None else values.index_select(0, chosen))


def _blocks(memory: Any, stacks: Sequence[Any], num_rows: int) -> list[Any]:
    """Each stack's part of the memory, [num_rows, values]."""
    blocks, begin = [], 0
    for stack in stacks:
        end = begin + num_rows * stack[0, 0].numel()
        blocks.append(memory[begin:end].view(num_rows, stack[0, 0].numel()))
        begin = end
    return blocks


def _tables(stacks: Sequence[Any]) -> list[Any]:
    """The stacks' memory as [slots * E_local, values], the values as wide as possible.

    What is copied by index takes as long for 2 bytes as for 16.
    """
    import torch

    tables = [stack.view(stack.shape[0] * stack.shape[1], -1) for stack in stacks]
    offsets = [n * t.element_size() for t in tables for n in (t.shape[1], t.storage_offset())]
    for dtype in (torch.complex128, torch.int64, torch.int32):
        if all(offset % dtype.itemsize == 0 for offset in offsets):
            return [table.view(dtype) for table in tables]
    return tables


def _row_numbers(slot_rows: int, slots: Sequence[int], experts: Sequence[int], device: Any) -> Any:
    """[len(experts) * len(slots)], on the device, without waiting for what it is busy with.

    Not from pinned memory: what little there is CUDA takes along with the command, and pinning waits.
    """
    import torch

    numbers = [slot * slot_rows + expert for expert in experts for slot in slots]
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


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
    import torch
    import torch.distributed as dist

    own = torch.tensor(numbers, dtype=torch.int64)
    said = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(said, own, group, async_op=True).wait(_LIMIT)
    return [each.tolist() for each in said]
