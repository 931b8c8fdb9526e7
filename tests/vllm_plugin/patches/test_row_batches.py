"""Which layers' rows go together when experts move; what arrives is in test_rebalancing_conformance.py."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorashard.vllm_plugin.load.expert_moves import plan_moves
from lorashard.vllm_plugin.patches.row_batches import (
    SEND_BYTES,
    MovingLayer,
    Workspace,
    batches_of,
    room_for,
    workspace_in,
)
from lorashard.vllm_plugin.patches.row_tables import tables_of

NUM_RANKS, NUM_SLOTS, EXPERTS = 2, 3, 8
WIDTH = 3  # 4-byte values of a row


def moving_layers(rank: int, seed: int, count: int) -> list[MovingLayer]:
    shuffled = random.Random(seed)
    stacks = [
        torch.zeros(NUM_SLOTS, EXPERTS // NUM_RANKS, 2, cols, dtype=torch.bfloat16)
        for cols in (1, 2)
    ]
    (rows,) = tables_of([stacks])
    layers = []
    for _ in range(count):
        before, after = list(range(EXPERTS)), list(range(EXPERTS))
        shuffled.shuffle(after)
        layers.append(MovingLayer(rows, plan_moves(before, after, NUM_RANKS, rank)))
    return layers


@given(
    seed=st.integers(0, 99), count=st.integers(1, 9), num_slots=st.integers(1, NUM_SLOTS),
    room=st.integers(1, 400), send_bytes=st.integers(1, 600),
)  # fmt: skip
def test_all_ranks_send_the_same_layers_together_and_they_fit(
    seed: int, count: int, num_slots: int, room: int, send_bytes: int
) -> None:
    sizes = []
    leaving = torch.empty(send_bytes, dtype=torch.uint8)
    space = Workspace(torch.empty(room, dtype=torch.bfloat16), leaving)
    for rank in range(NUM_RANKS):
        layers = moving_layers(rank, seed, count)
        batches = list(batches_of(layers, num_slots, space))
        assert [id(layer) for batch in batches for layer in batch] == list(map(id, layers))
        for batch in batches:
            sent = num_slots * sum(layer.most_sent_bytes for layer in batch)
            fits = room_for(batch, num_slots) <= room and sent <= send_bytes
            assert fits or len(batch) == 1
        sizes.append([len(batch) for batch in batches])
    assert sizes[0] == sizes[1]


def test_layers_go_together_up_to_what_there_is_room_for() -> None:
    layers = moving_layers(0, seed=1, count=5)
    of_one = EXPERTS // NUM_RANKS * WIDTH
    assert room_for(layers[:1], 2) == 2 * of_one
    space = Workspace(torch.empty(2 * of_one, dtype=torch.bfloat16))
    together = [len(batch) for batch in batches_of(layers, 1, space)]
    assert together == [2, 2, 1]
    assert list(batches_of([], 1, space)) == []


def test_the_two_largest_buffers_are_used_whatever_they_held() -> None:
    buffers = [
        torch.empty(2, 3, dtype=torch.float32),
        torch.empty(5, dtype=torch.uint8),  # half a value too long
        torch.empty(3, 20, dtype=torch.uint8),
        torch.empty(101, dtype=torch.uint8)[1:],  # begins within a value
        torch.empty(40, 2, dtype=torch.bfloat16).t(),  # its memory is in another order
        torch.empty(4, 8, dtype=torch.bfloat16),
    ]
    space = workspace_in(buffers, torch.bfloat16)
    assert space is not None
    assert [space.arriving.data_ptr(), space.leaving.data_ptr()] == [
        buffers[5].data_ptr(),
        buffers[2].data_ptr(),
    ]
    assert (len(space.arriving), len(space.leaving), space.send_bytes) == (32, 30, 60)
    assert space.arriving.dtype == space.leaving.dtype == torch.bfloat16
    assert workspace_in(buffers[:2], torch.bfloat16) is None
    assert Workspace(space.arriving).send_bytes == SEND_BYTES
