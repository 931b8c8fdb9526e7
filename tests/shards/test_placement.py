"""Which expert stands where: vLLM's two rules, and explicit maps in every form."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.errors import PlacementError
from lorashard.shards.placement import (
    Placement,
    bind_layers,
    explicit_placement,
    linear_placement,
    round_robin_placement,
)
from tests.strategies import rank_lists

MODULES = [f"model.layers.{i}.mlp.experts" for i in (1, 2, 12)]


def explicit(spec: object, num_experts: int = 3, ep_size: int = 2) -> Placement:
    return explicit_placement(spec, num_experts, ep_size)


def refusal(spec: object, num_experts: int = 3, ep_size: int = 2) -> str:
    with pytest.raises(PlacementError) as caught:
        explicit(spec, num_experts, ep_size)
    return str(caught.value)


def as_expert_map(ranks: list[list[int]], num_experts: int) -> list[list[int]]:
    return [
        [rank.index(expert) if expert in rank else -1 for expert in range(num_experts)]
        for rank in ranks
    ]


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "ranks"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (2, 4, [[0], [1], [], []]),
    ],
)
def test_linear_gives_the_first_ranks_one_expert_more(num_experts, ep_size, ranks):
    assert [list(rank) for rank in linear_placement(num_experts, ep_size).ranks] == ranks


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "ranks"),
    [
        (4, 2, [[0, 2], [1, 3]]),
        (5, 2, [[0, 2, 4], [1, 3]]),
        (8, 3, [[0, 3, 6], [1, 4, 7], [2, 5]]),
        (2, 4, [[0], [1], [], []]),
    ],
)
def test_round_robin_deals_the_experts_out(num_experts, ep_size, ranks):
    assert [list(rank) for rank in round_robin_placement(num_experts, ep_size).ranks] == ranks


@pytest.mark.parametrize("rule", [linear_placement, round_robin_placement])
@given(num_experts=st.integers(1, 40), ep_size=st.integers(1, 40))
def test_a_rule_puts_every_expert_on_one_rank(rule: Any, num_experts: int, ep_size: int):
    placement = rule(num_experts, ep_size)
    assert placement.ep_size == ep_size
    assert sorted(e for rank in placement.ranks for e in rank) == list(range(num_experts))


@pytest.mark.parametrize("rule", [linear_placement, round_robin_placement, explicit])
@pytest.mark.parametrize(("num_experts", "ep_size"), [(4, 0), (4, -1), (0, 2), (-3, 1)])
def test_counts_below_one_are_refused(rule: Any, num_experts: int, ep_size: int):
    arguments = ([[]],) if rule is explicit else ()
    with pytest.raises(PlacementError, match="at least 1"):
        rule(*arguments, num_experts, ep_size)


def test_expert_map_is_vllm_s_global_to_local_table():
    placement = explicit([[2, 0], [1]])
    assert [placement.expert_map(rank) for rank in range(2)] == [(1, -1, 0), (-1, 0, -1)]


def test_expert_map_of_a_module_follows_its_layer():
    placement = bind_layers(
        explicit({"ranks": [[0, 1], [2]], "layers": {"2": [[2], [1, 0]]}}), MODULES
    )
    assert placement.expert_map(1, MODULES[1]) == (1, 0, -1)
    assert placement.expert_map(1, MODULES[0]) == (-1, -1, 0)


@pytest.mark.parametrize(
    "spec",
    [
        [[2, 0], [1]],
        {"ranks": [[2, 0], [1]]},
        [[1, -1, 0], [-1, 0, -1]],
        {"expert_map": [[1, -1, 0], [-1, 0, -1]]},
        {"ranks": [[2, 0], [1]], "strategy": "x", "ep_size": 2, "num_experts": 3},
    ],
    ids=str,
)
def test_all_forms_of_a_map_mean_the_same(spec: object):
    assert explicit(spec).ranks == ((2, 0), (1,))


@given(data=st.data(), num_experts=st.integers(1, 9), ep_size=st.integers(1, 5))
def test_slot_order_and_expert_map_of_one_placement_agree(data, num_experts, ep_size):
    ranks = data.draw(rank_lists(num_experts, ep_size))
    spec = {"expert_map": as_expert_map(ranks, num_experts)}
    assert explicit(spec, num_experts, ep_size).ranks == tuple(map(tuple, ranks))


@pytest.mark.parametrize("form", ["ranks", "expert_map"])
@given(data=st.data(), num_experts=st.integers(1, 6), ep_size=st.integers(1, 4))
def test_a_bare_list_is_read_as_meant_or_refused(form, data, num_experts, ep_size):
    ranks = data.draw(rank_lists(num_experts, ep_size))
    rows = ranks if form == "ranks" else as_expert_map(ranks, num_experts)
    try:
        found = explicit(rows, num_experts, ep_size).ranks
    except PlacementError as err:
        full = all(sorted(row) == list(range(num_experts)) for row in rows)
        if not full:
            raise AssertionError(rows) from err
    else:
        assert found == tuple(map(tuple, ranks))


def test_redundant_experts_stand_on_several_ranks():
    assert explicit([[0, 1], [1, 2]]).ranks == ((0, 1), (1, 2))


def test_a_rank_may_hold_no_expert():
    assert explicit([[0, 1, 2], []]).ranks == ((0, 1, 2), ())


@pytest.mark.parametrize("rows", [[[1, 2, 0], [0, 1, 2]], [[1, 2, 0], [2, 0, 1]]])
def test_full_lists_that_can_be_read_two_ways_are_refused(rows: list[list[int]]):
    assert "with different results" in refusal(rows)


@pytest.mark.parametrize("rows", [[[0, 1, 2], [0, 1, 2]], [[1, 0, 2], [2, 1, 0]]])
def test_full_lists_that_mean_the_same_both_ways_are_read(rows: list[list[int]]):
    assert explicit(rows).ranks == tuple(map(tuple, rows))


def test_a_full_list_that_says_its_form_is_read():
    assert explicit({"expert_map": [[1, 2, 0], [0, 1, 2]]}).ranks == ((2, 0, 1), (0, 1, 2))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([[0, 1], [1]], "no rank holds expert 2"),
        ([[], []], "no rank holds expert 0, 1, 2"),
        ([[0, 1, 1], [2]], "expert 1 is twice on rank 0"),
        ([[0, 1, 3], [2]], "rank 0 lists expert 3"),
        ([[0, 1, -2], [2]], "rank 0 lists expert -2"),
        ([[0, 1, 2]], "1 ranks listed"),
        ([[0], [1], [2]], "3 ranks listed"),
        ([], "0 ranks listed"),
        ([[0, 1], "2"], "not a list of integers"),
        ([[0, 1], [2.0]], "not a list of integers"),
        ([[0, True], [2]], "not a list of integers"),
        ([[0, None], [2]], "not a list of integers"),
        ([0, 1, 2], "not a list of integers"),
        ("012", "not a list of lists"),
        (7, "not a list of lists"),
        (None, "not a list of lists"),
        ([[0, -1, -1], [-1, 0, -1]], "no rank holds expert 2"),
        ([[0, -1, 2], [-1, 0, -1]], "not an expert_map"),
        ([[0, -1, 0], [-1, 0, -1]], "not an expert_map"),
        ([[0, -1, -2], [-1, 0, 1]], "not an expert_map"),
        ([[0, -1], [-1, 0, 1]], "not an expert_map"),
        ({"expert_map": [[0, 1], [2]]}, "not an expert_map"),
        ({"ranks": [[0, 1, -1], [2]]}, "rank 0 lists expert -1"),
        ({}, "neither 'ranks' nor 'expert_map'"),
        ({"layers": {}}, "neither 'ranks' nor 'expert_map'"),
        ({"rank": [[0, 1], [2]]}, "unknown key 'rank'"),
        ({"ranks": None}, "not a list of lists"),
        ({"ranks": [[0, 1], [2]], "layers": [[0]]}, "'layers' is not an object"),
        ({"ranks": [[0, 1], [2]], "layers": {"4": [[0], [1]]}}, "layer 4: no rank holds expert 2"),
        ({"ranks": [[0, 1], [2]], "layers": {"4": None}}, "layer 4: not a list of lists"),
    ],
    ids=str,
)
def test_a_map_that_does_not_fit_is_refused(spec: object, reason: str):
    assert reason in refusal(spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"ranks": [[0, 1], [2]], "num_experts": 64}, "num_experts is 64, but here it is 3"),
        ({"ranks": [[0, 1], [2]], "ep_size": 8}, "ep_size is 8, but here it is 2"),
        (
            {"ranks": [[0, 1], [2]], "expert_map": [[-1, 0, -1], [0, -1, 1]]},
            "both 'ranks' and 'expert_map'",
        ),
        ([[0, 1, 2], ""], "rank 1 is not a list of integers"),
    ],
    ids=["num_experts", "ep_size", "ranks-and-expert_map", "string-for-a-rank"],
)
def test_a_map_that_contradicts_itself_is_refused(spec: object, reason: str):
    assert reason in refusal(spec)


def layered(**layers: object) -> Placement:
    return explicit({"ranks": [[0, 1], [2]], "layers": layers})


@pytest.mark.parametrize("key", [MODULES[0], "1"])
@pytest.mark.parametrize(
    "value", [[[2], [0, 1]], {"ranks": [[2], [0, 1]]}, {"expert_map": [[-1, -1, 0], [0, 1, -1]]}]
)
def test_a_layer_is_named_by_module_or_number(key: str, value: object):
    placement = bind_layers(layered(**{key: value}), MODULES)
    assert placement.layers == {MODULES[0]: ((2,), (0, 1))}


def test_a_layer_number_is_a_whole_component_of_the_name():
    placement = bind_layers(layered(**{"2": [[2], [0, 1]]}), MODULES)
    assert list(placement.layers) == ["model.layers.2.mlp.experts"]


def test_modules_without_a_placement_of_their_own_take_the_default():
    placement = bind_layers(layered(**{"1": [[2], [0, 1]]}), MODULES)
    assert placement.ranks_of(MODULES[1]) == placement.ranks


def test_a_layer_that_does_not_differ_is_left_out():
    assert bind_layers(layered(**{"1": [[0, 1], [2]]}), MODULES).layers == {}


@pytest.mark.parametrize("key", ["3", "01", "", "mlp", "model.layers.1.mlp", "-1"])
def test_a_layer_that_the_adapter_lacks_is_refused(key: str):
    with pytest.raises(PlacementError, match="is not in the adapter"):
        bind_layers(layered(**{key: [[2], [0, 1]]}), MODULES)


def test_a_map_of_a_whole_model_may_have_layers_that_the_adapter_lacks():
    placement = bind_layers(
        layered(**{"1": [[2], [0, 1]], "9": [[0], [1, 2]]}), MODULES, has_others=True
    )
    assert placement.layers == {MODULES[0]: ((2,), (0, 1))}


def test_a_layer_placed_twice_is_refused():
    twice = layered(**{"1": [[2], [0, 1]], MODULES[0]: [[1], [0, 2]]})
    with pytest.raises(PlacementError, match="listed twice, differently"):
        bind_layers(twice, MODULES)
