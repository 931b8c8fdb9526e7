"""What is said about placements and training, and what goes without saying."""

from __future__ import annotations

import pytest

from lorashard.inspect.findings import findings_of
from lorashard.inspect.picture import ModuleExperts
from lorashard.shards.placement import linear_placement, round_robin_placement


def modules(*, ranks, sizes=(10,) * 4, untrained=(), count=2):
    return [ModuleExperts(str(n), ranks, sizes, frozenset(untrained)) for n in range(count)]


def said(found) -> str:
    return " ".join(f"{finding.kind}: {finding.text}" for finding in findings_of(found))


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_equal_blocks_of_trained_experts_go_without_saying(ep_size: int):
    assert said(modules(ranks=linear_placement(4, ep_size).ranks)) == ""


@pytest.mark.parametrize(
    "ranks",
    [
        round_robin_placement(4, 2).ranks,
        linear_placement(4, 3).ranks,
        ((2, 3), (0, 1)),
        ((1, 0), (2, 3)),
        ((0, 1, 2), (1, 2, 3)),
        ((0, 1, 2, 3), ()),
    ],
)
def test_any_other_placement_is_a_warning(ranks):
    assert said(modules(ranks=ranks)).startswith("warning: The experts are not in equal")


def test_one_rank_has_everything_in_any_order():
    assert "warning" not in said(modules(ranks=((3, 2, 1, 0),)))


def test_a_layer_with_a_placement_of_its_own_is_enough_for_a_warning():
    mixed = [*modules(ranks=((0, 1), (2, 3))), *modules(ranks=((0, 2), (1, 3)))]
    assert "warning" in said(mixed)
    assert "The layers have 2 different placements." in said(mixed)


def test_copies_are_counted():
    assert "2 expert slots, counted over 2 layers, are copies" in said(
        modules(ranks=((0, 1, 2), (3, 1)))
    )


def test_ranks_that_hold_much_more_are_named():
    assert "Rank 1 holds 6 experts and rank 0 holds 2, counted over 2 layers." in said(
        modules(ranks=((0,), (1, 2, 3)))
    )


def test_untrained_experts_and_smaller_r_are_named():
    text = said(modules(ranks=(), sizes=(0, 5, 10, 10), untrained=(0,)))
    assert "In 2 of 2 layers, 1 expert is not trained." in text
    assert "smaller r" in text
    assert "smaller r" not in said(modules(ranks=(), sizes=(0, 10, 10, 10), untrained=(0,)))
