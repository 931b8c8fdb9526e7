"""Options that commands share: what they mean together, and which contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from lorashard import LayoutOptions, SplitRequest
from lorashard.adapter.options import ExpertLayout
from lorashard.cli import options as opt
from lorashard.dtypes import CAST_DTYPES
from lorashard.errors import AdapterError, PlacementError
from lorashard.shards.placement import linear_placement, round_robin_placement
from tests.tiny import run_cli

DEFAULTS: dict[str, Any] = {
    "ep_size": 2, "placement": "linear", "expert_map": None, "model": None, "num_experts": None,
    "lora_b_layout": None, "orientation": None, "dtype": None, "allow_pickle": False,
}  # fmt: skip


def test_each_option_goes_where_it_belongs() -> None:
    request = opt.split_request(
        ep_size=4, placement="round_robin", expert_map=None, model=None, num_experts=8,
        lora_b_layout="grouped_by_expert", orientation="transposed", dtype="bfloat16",
        allow_pickle=True,
    )  # fmt: skip
    assert request == SplitRequest(
        ep_size=4,
        strategy="round_robin",
        dtype="bfloat16",
        options=LayoutOptions(
            num_experts=8, lora_b_layout="grouped_by_expert", orientation="transposed"
        ),
        allow_pickle=True,
    )


def test_no_option_can_be_given_by_position() -> None:
    with pytest.raises(TypeError):
        opt.split_request(*DEFAULTS.values())  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"expert_map": Path("map.json"), "placement": "round_robin"}, PlacementError),
        ({"model": "some/model", "num_experts": 4}, AdapterError),
    ],
)
def test_two_options_that_say_the_same_thing_are_refused(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match="both"):
        opt.split_request(**DEFAULTS | options)


@pytest.mark.parametrize(
    ("ep_rank", "node_ranks", "chosen"),
    [
        (None, None, ()),
        ([3, 1, 3], None, (1, 3)),
        (None, "0-3", (0, 1, 2, 3)),
        ([7], "2-2", (2, 7)),
    ],
)
def test_ranks_are_named_one_by_one_or_as_a_range(
    ep_rank: list[int] | None, node_ranks: str | None, chosen: tuple[int, ...]
) -> None:
    assert opt.chosen_ranks(ep_rank, node_ranks) == chosen


@pytest.mark.parametrize("node_ranks", ["", "3", "3-1", "-3", "a-b", "0-3-5", "0 - 3"])
def test_a_range_of_ranks_that_is_none_is_refused(node_ranks: str) -> None:
    with pytest.raises(PlacementError, match="is not a range"):
        opt.chosen_ranks(None, node_ranks)


@pytest.mark.parametrize("node_ranks", ["0-9999999999", "0-" + "9" * 5000, "9" * 5000 + "-1"])
def test_a_range_of_ranks_that_no_cluster_has_is_refused(node_ranks: str) -> None:
    with pytest.raises(PlacementError, match="is beyond rank 65535"):
        opt.chosen_ranks(None, node_ranks)


@pytest.mark.parametrize("rule", [linear_placement, round_robin_placement])
def test_an_ep_size_that_no_cluster_has_is_refused(rule: Callable[[int, int], object]) -> None:
    with pytest.raises(PlacementError, match="it can be 65536 at most"):
        rule(8, 65_537)


def test_the_command_line_takes_what_the_core_takes() -> None:
    from lorashard.cli.convert import convert
    from lorashard.cli.split import split

    assert get_args(get_args(get_type_hints(split)["dtype"])[0]) == tuple(CAST_DTYPES)
    assert get_args(get_type_hints(convert)["layout"]) == get_args(ExpertLayout)


@pytest.mark.parametrize(
    "arguments",
    [("--placement", "random"), ("--dtype", "int8"), ("--orientation", "rank_major")],
)
def test_a_value_that_an_option_does_not_have_is_a_usage_error(arguments: tuple[str, str]) -> None:
    assert run_cli("split", "adapter", "--ep-size", 2, *arguments).returncode == 2
