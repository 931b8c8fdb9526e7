"""plan_moves: whatever the maps, each slot ends with the expert that it should have."""

import pytest
from hypothesis import given, strategies

from lorashard.vllm_plugin.load.expert_moves import ExpertMoves, plan_moves


@strategies.composite
def maps(draw: strategies.DrawFn) -> tuple[int, list[int], list[int]]:
    """Ranks, and two maps of the same experts, each of them at least once."""
    num_ranks = draw(strategies.integers(1, 5))
    num_local = draw(strategies.integers(1, 6))
    num_experts = draw(strategies.integers(1, num_ranks * num_local))
    rest = num_ranks * num_local - num_experts
    found = []
    for _ in range(2):
        copies = draw(
            strategies.lists(strategies.integers(0, num_experts - 1), min_size=rest, max_size=rest)
        )
        found.append(draw(strategies.permutations([*range(num_experts), *copies])))
    return num_ranks, found[0], found[1]


def carried_out(num_ranks: int, before: list[int], plans: list[ExpertMoves]) -> list[int]:
    """The experts of all slots after what the ranks have planned, message by message."""
    num_local = len(before) // num_ranks
    after = list(before)
    for rank, plan in enumerate(plans):
        arrivals = []
        for source, other in enumerate(plans):
            sent = other.sent[rank]
            assert len(sent) == plan.received[source]
            arrivals += [before[source * num_local + slot] for slot in sent]
        for expert, slots in zip(arrivals, plan.targets, strict=True):
            for slot in slots:
                after[rank * num_local + slot] = expert
    return after


@given(maps())
def test_each_slot_gets_its_expert_once_for_each_rank(
    case: tuple[int, list[int], list[int]],
) -> None:
    num_ranks, before, after = case
    plans = [plan_moves(before, after, num_ranks, rank) for rank in range(num_ranks)]
    assert carried_out(num_ranks, before, plans) == after
    num_local = len(before) // num_ranks
    for rank, plan in enumerate(plans):
        own = range(rank * num_local, (rank + 1) * num_local)
        new = {after[place] for place in own if after[place] != before[place]}
        assert sum(plan.received) == len(new)
        assert plan.received[rank] == len(new & {before[place] for place in own})
        assert all(plan.targets)
        assert plan.most_sent == max(
            sum(len(sent) for to, sent in enumerate(each.sent) if to != source)
            for source, each in enumerate(plans)
        )


def test_slots_without_an_expert_get_nothing() -> None:
    plan = plan_moves([0, 1, 2, -1], [1, 0, -1, 2], 2, 1)
    assert plan.targets == ((1,),)
    assert plan.received == (0, 1)


def test_of_ranks_that_have_an_expert_the_one_that_sends_the_least_gives_it() -> None:
    plans = [plan_moves([0, 0, 1, 2], [0, 0, 0, 0], 4, rank) for rank in range(4)]
    assert [plan.received for plan in plans[2:]] == [(1, 0, 0, 0), (0, 1, 0, 0)]
    assert {plan.most_sent for plan in plans} == {1}


def test_an_expert_that_was_nowhere() -> None:
    with pytest.raises(KeyError):
        plan_moves([0, 1], [0, 2], 2, 0)
