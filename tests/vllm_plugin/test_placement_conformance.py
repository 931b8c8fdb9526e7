"""lorashard's placements against `determine_expert_map` of vLLM releases, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

from lorashard.shards.placement import Placement, linear_placement, round_robin_placement
from tests.vllm_release import run_in_release

EXPERT_COUNTS = (1, 2, 3, 5, 6, 7, 8, 15, 16, 40, 60, 64, 128, 160, 256, 384)
EP_SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)

# Release -> the module that defines `determine_expert_map`; it moved in 0.22.1.
MODULES = {
    "0.20.2": "vllm.model_executor.layers.fused_moe.layer",
    "0.33.0": "vllm.model_executor.layers.fused_moe.expert_map_manager",
}
PLACEMENTS: dict[str, Callable[[int, int], Placement]] = {
    "linear": linear_placement,
    "round_robin": round_robin_placement,
}

SCRIPT = """
from {module} import determine_expert_map

def rank_map(strategy, num_experts, ep_size, ep_rank):
    try:
        num_local, expert_map, _ = determine_expert_map(ep_size, ep_rank, num_experts, strategy)
    except RuntimeError as err:
        return [None, str(err)]
    return [num_local, None if expert_map is None else expert_map.tolist()]

answer([
    [strategy, num_experts, ep_size, ep_rank, *rank_map(strategy, num_experts, ep_size, ep_rank)]
    for strategy in {strategies}
    for num_experts in {expert_counts}
    for ep_size in {ep_sizes}
    for ep_rank in range(ep_size)
])
"""

pytestmark = pytest.mark.parametrize("release", MODULES)


class RankMap(NamedTuple):
    """What vLLM answered for one ep rank: `num_local` and its expert_map, or None and an error."""

    strategy: str
    num_experts: int
    ep_size: int
    ep_rank: int
    num_local: int | None
    expert_map: list[int] | str | None  # None = vLLM makes no map: every expert is local


@cache
def vllm_maps(release: str) -> list[RankMap]:
    script = SCRIPT.format(
        module=MODULES[release],
        strategies=tuple(PLACEMENTS),
        expert_counts=EXPERT_COUNTS,
        ep_sizes=EP_SIZES,
    )
    return [RankMap(*row) for row in run_in_release(release, script)]


def answered(release: str, strategy: str) -> Iterator[tuple[RankMap, Placement]]:
    for row in vllm_maps(release):
        if row.strategy == strategy and row.num_local is not None:
            yield row, PLACEMENTS[strategy](row.num_experts, row.ep_size)


@pytest.mark.parametrize("strategy", PLACEMENTS)
def test_expert_map_of_every_rank_is_vllms(release: str, strategy: str) -> None:
    compared = 0
    for row, placement in answered(release, strategy):
        everything_local = tuple(range(row.num_experts))
        expected = everything_local if row.expert_map is None else tuple(row.expert_map)
        assert placement.expert_map(row.ep_rank) == expected, row[:4]
        compared += 1
    assert compared > len(EXPERT_COUNTS) * len(EP_SIZES)


@pytest.mark.parametrize("strategy", PLACEMENTS)
def test_every_rank_holds_as_many_experts_as_in_vllm(release: str, strategy: str) -> None:
    for row, placement in answered(release, strategy):
        assert len(placement.ranks[row.ep_rank]) == row.num_local, row[:4]


def test_vllm_makes_no_map_for_one_rank_only(release: str) -> None:
    assert {row.ep_size for row in vllm_maps(release) if row.expert_map is None} == {1}


def test_vllm_refuses_only_round_robin_ranks_past_the_last_expert(release: str) -> None:
    # torch.arange(ep_rank, num_experts, ep_size) raises for ep_rank > num_experts; lorashard gives
    # such a rank no expert, as it does for the linear placement.
    refused = [row for row in vllm_maps(release) if row.num_local is None]
    past_the_last = [
        row
        for row in vllm_maps(release)
        if row.strategy == "round_robin" and row.ep_rank > row.num_experts
    ]
    assert refused == past_the_last
