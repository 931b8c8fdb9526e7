"""Maps of experts that move: what a rank holds, and what `split` makes of an engine's map."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.shards.placement import OF_ENGINE, bind_layers, explicit_placement
from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps, expert_map_document, place_layers
from lorashard.vllm_plugin.engine.live import LiveExperts

NAMES = ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts")
MAPS = ExpertMaps({NAMES[0]: (0, 1, 2, 3, 0, 1), NAMES[1]: (3, 3, 1, 0, 2, 3)})


def live(name: str, ep_rank: int) -> LiveExperts:
    return LiveExperts(
        name=name, wrapper="2d", num_experts=4, ep_rank=ep_rank, ep_size=2, local_experts=(0, 1, 2),
        gated=True, hidden_size=8, intermediate_size=4, buffer_intermediate=4, max_lora_rank=8,
        interleaved=False, shared_outer=False,
    )  # fmt: skip


@pytest.mark.parametrize(("ep_rank", "experts"), [(0, (3, 3, 1)), (1, (0, 2, 3))])
def test_a_rank_holds_its_part_of_the_map_in_slot_order(
    ep_rank: int, experts: tuple[int, ...]
) -> None:
    placed = place_layers({NAMES[1]: live(NAMES[1], ep_rank)}, MAPS)
    assert placed[NAMES[1]].local_experts == experts


def test_layers_whose_experts_never_move_stay_as_they_were() -> None:
    layers = {"other": live("other", 0)}
    assert place_layers(layers, MAPS) == layers
    assert place_layers(layers, None) is layers


def test_a_layer_s_new_map_has_a_number_of_its_own_and_leaves_the_others() -> None:
    changed = MAPS.with_layer(NAMES[0], [1, 1, 1, 0, 2, 3])
    assert changed.number == MAPS.number + 1
    assert changed.layers == {NAMES[0]: (1, 1, 1, 0, 2, 3), NAMES[1]: MAPS.layers[NAMES[1]]}
    assert list(changed.layers) == list(MAPS.layers)
    assert MAPS.layers[NAMES[0]] == (0, 1, 2, 3, 0, 1)


def test_an_engine_s_map_is_one_for_split_with_each_expert_once_on_a_rank() -> None:
    document = json.loads(json.dumps(expert_map_document(MAPS, 2)))
    assert (document["num_experts"], document["ep_size"]) == (4, 2)
    assert document[OF_ENGINE] is True
    placement = bind_layers(explicit_placement(document, 4, 2), NAMES)
    assert placement.ranks_of(NAMES[0]) == ((0, 1, 2), (3, 0, 1))
    assert placement.ranks_of(NAMES[1]) == ((3, 1), (0, 2, 3))


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (NAMES, {"1", "2"}),
        (("a.1.experts", "b.1.experts"), None),  # one number for both
        (("a.1.experts", "b.experts"), None),  # no number
        (("a.1.experts", "b.2.part.3.experts"), None),  # one of two
    ],
)
def test_layers_go_by_their_numbers_if_those_are_clear_else_by_their_names(
    names: tuple[str, str], keys: set[str] | None
) -> None:
    maps = ExpertMaps({names[0]: (0, 1), names[1]: (1, 0)})
    layers = expert_map_document(maps, 2)["layers"]
    assert set(layers) == (keys or set(names))  # type: ignore[call-overload]


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=3), st.sampled_from((1, 2, 3)))
def test_every_map_of_an_engine_is_valid(layers: list[list[int]], ep_size: int) -> None:
    names = [f"model.layers.{number}.mlp.experts" for number in range(len(layers))]
    maps = ExpertMaps({name: tuple(slots) for name, slots in zip(names, layers)})
    placement = bind_layers(
        explicit_placement(expert_map_document(maps, ep_size), 6, ep_size), names
    )
    assert [placement.ranks_of(name) for name in names] == [
        maps.ranks_of(name, ep_size) for name in names
    ]
