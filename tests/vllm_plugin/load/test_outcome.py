"""The judgement that the loader acts on: from real directories, for engines of every placement."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import LayoutError, PlacementError
from lorashard.shards.placement import Ranks, linear_placement, round_robin_placement
from lorashard.vllm_plugin.doctor.live_layers import NamesOfAdapter
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.outcome import LoadOutcome, explain_load, strict_error
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.tiny import MODULE, E, H, I, R, save_adapter

LIVE = LiveExperts(
    name=MODULE, wrapper="2d", num_experts=E, ep_rank=0, ep_size=2, local_experts=(0, 1),
    gated=True, hidden_size=H, intermediate_size=I, buffer_intermediate=I, max_lora_rank=8,
    interleaved=False, shared_outer=False,
)  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


def outcome(directory: Path, *, plain: bool = False, **changes: Any) -> LoadOutcome:
    live = replace(LIVE, **changes)
    with ExitStack() as stack:
        contents = open_shard_directory(directory, stack)
    where = None if plain else str(directory)
    return explain_load(contents, {MODULE: live}, NamesOfAdapter(), where)


def on(engine: Ranks, ep_rank: int) -> dict[str, Any]:
    return {"ep_size": len(engine), "ep_rank": ep_rank, "local_experts": engine[ep_rank]}


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_shards_of_the_engines_placement_are_read_from_one_file(
    directory: Path, ep_rank: int
) -> None:
    found = outcome(directory, **on(linear_placement(E, 2).ranks, ep_rank))
    assert (found.advice, found.gives_advice) == (None, False)
    (layer,) = found.layers
    assert [(run.ep_rank, run.count) for run in layer.runs] == [(ep_rank, 2)]
    assert layer.assembly.lora_rank == R


def test_shards_of_another_placement_are_read_from_several_and_one_rank_says_so(
    directory: Path,
) -> None:
    engine = round_robin_placement(E, 2).ranks
    first, second = (outcome(directory, **on(engine, ep_rank)) for ep_rank in (0, 1))
    assert {run.ep_rank for run in first.layers[0].runs} == {0, 1}
    assert first.advice is not None
    assert second.advice is not None
    assert (
        f"lorashard reshard {directory} -o {directory}-resharded --ep-size 2 --placement round_robin"
        in first.advice
    )
    assert (first.gives_advice, second.gives_advice) == (True, False)


def test_a_plain_adapter_has_no_placement_to_advise_on(directory: Path) -> None:
    found = outcome(directory, plain=True, **on(round_robin_placement(E, 2).ranks, 0))
    assert (found.advice, found.gives_advice, len(found.layers)) == (None, False, 1)


def test_what_does_not_fit_is_refused_before_any_advice(directory: Path) -> None:
    with pytest.raises(LayoutError, match=f"the adapter has {E} experts"):
        outcome(directory, num_experts=2 * E, **on(linear_placement(2 * E, 4).ranks, 0))


def test_the_strict_error_carries_the_advice() -> None:
    error = strict_error("some/shards", "split for 3 ranks")
    assert isinstance(error, PlacementError)
    assert str(error) == (
        "some/shards: split for 3 ranks (rule other-placement)\n  LORASHARD_STRICT makes this an error."
    )
