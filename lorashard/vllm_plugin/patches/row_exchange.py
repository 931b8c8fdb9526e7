"""Rows of the LoRA stacks go from rank to rank: one message from each rank to each other.

An expert's rows of all slots that travel, and of all stacks of a layer, lie side by side in a message.
With a message for each expert and stack, as vLLM sends the base weights, sending them took longer
than the base weights themselves, which are 30 times as large.
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
    """Rows that have come, of some slots. rows: [R, len(slots) of the first stack, then of the next, ...]."""

    slots: tuple[int, ...]
    rows: Any


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
    num_rows, width, begin = sum(moves.received), row_width(stacks), 0
    arrivals = []
    for group in _groups(slots, moves.most_sent * width * room.element_size()):
        end = begin + num_rows * len(group) * width
        rows = room[begin:end].view(num_rows, len(group) * width)
        begin = end
        outgoing = _gather(stacks, group, [slot for sent in moves.sent for slot in sent])
        at_out = at_in = 0
        for peer, (sent, count) in enumerate(zip(moves.sent, moves.received, strict=True)):
            out = outgoing[at_out : at_out + len(sent)]
            incoming = rows[at_in : at_in + count]
            at_out, at_in = at_out + len(sent), at_in + count
            if peer == rank:
                incoming.copy_(out)
                continue
            if len(out):
                communicator.add_send([out], peer, expert_id=0)
            if count:
                communicator.add_recv([incoming], peer, expert_id=0)
        communicator.execute()
        arrivals.append(Arrivals(group, rows))
    return arrivals


def put_rows(stacks: Sequence[Any], moves: ExpertMoves, arrivals: Sequence[Arrivals]) -> None:
    """What has arrived goes into the stacks."""
    if not moves.targets:
        return
    for arrived in arrivals:
        num_slots = len(arrived.slots)
        into = [
            slot * stacks[0].shape[1] + target for target in moves.targets for slot in arrived.slots
        ]
        into, positions = (_numbers(n, arrived.rows.device) for n in (into, moves.positions))
        for stack, columns in _columns(stacks, num_slots):
            values = arrived.rows[:, columns].index_select(0, positions)
            rows = _rows(stack)
            rows.index_copy_(0, into, values.view(-1, rows.shape[1]))


def _groups(slots: Sequence[int], slot_bytes: int) -> Iterator[tuple[int, ...]]:
    count = max(1, SEND_BYTES // max(1, slot_bytes))
    for first in range(0, len(slots), count):
        yield tuple(slots[first : first + count])


def _gather(stacks: Sequence[Any], slots: Sequence[int], experts: Sequence[int]) -> Any:
    """[len(experts), values of all slots of the first stack, then of the next, ...]."""
    import torch

    num_local = stacks[0].shape[1]
    chosen = [slot * num_local + expert for expert in experts for slot in slots]
    numbers = _numbers(chosen, stacks[0].device)
    found = stacks[0].new_empty(len(experts), len(slots) * row_width(stacks))
    for stack, columns in _columns(stacks, len(slots)):
        values = torch.index_select(_rows(stack), 0, numbers)
        found[:, columns] = values.view(len(experts), columns.stop - columns.start)
    return found


def _columns(stacks: Sequence[Any], num_slots: int) -> Iterator[tuple[Any, slice]]:
    """Each stack, and where its values are in a row."""
    begin = 0
    for stack in stacks:
        end = begin + num_slots * stack[0, 0].numel()
        yield stack, slice(begin, end)
        begin = end


def _rows(stack: Any) -> Any:
    """[slots * E_local, values], the same memory."""
    return stack.view(stack.shape[0] * stack.shape[1], -1)


def _numbers(numbers: Sequence[int], device: Any) -> Any:
    import torch

    return torch.tensor(numbers, dtype=torch.int64, device=device)


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
