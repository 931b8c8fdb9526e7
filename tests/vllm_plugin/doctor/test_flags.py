"""What vLLM makes of its flags."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.adapter.base_model import parse_model_config
from lorashard.vllm_plugin.doctor.flags import EngineFlags, effective_placement

ROUND_ROBIN: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "expert_placement_strategy": "round_robin",
}


def model(**config: Any) -> Any:
    return parse_model_config({"model_type": "some_moe", "num_experts": 8, **config}, "config")


@pytest.mark.parametrize(
    ("flags", "ep_size"),
    [
        (EngineFlags(), 1),
        (EngineFlags(tensor_parallel_size=4), 1),
        (EngineFlags(enable_expert_parallel=True), 1),
        (EngineFlags(tensor_parallel_size=4, enable_expert_parallel=True), 4),
        (EngineFlags(4, data_parallel_size=2, enable_expert_parallel=True), 8),
    ],
)
def test_ep_ranks_are_all_ranks_with_the_flag_and_one_without(
    flags: EngineFlags, ep_size: int
) -> None:
    assert flags.ep_size == ep_size


def test_round_robin_holds_for_models_with_expert_groups() -> None:
    assert effective_placement(EngineFlags(**ROUND_ROBIN), model(n_group=2)) == (
        "round_robin", None,
    )  # fmt: skip


def test_round_robin_is_linear_for_models_without_and_that_is_said() -> None:
    placement, note = effective_placement(EngineFlags(**ROUND_ROBIN), model())
    assert placement == "linear"
    assert note is not None
    assert "some_moe" in note


def test_an_unnamed_model_is_taken_at_the_flags_word_with_a_note() -> None:
    placement, note = effective_placement(EngineFlags(**ROUND_ROBIN), None)
    assert placement == "round_robin"
    assert note is not None
    assert "`model`" in note


def test_eplb_places_linearly_whatever_the_model() -> None:
    placement, note = effective_placement(
        EngineFlags(**ROUND_ROBIN, enable_eplb=True), model(n_group=2)
    )
    assert (placement, note) == ("linear", "With --enable-eplb, vLLM places experts linearly.")


def test_on_one_rank_there_is_nothing_to_place() -> None:
    flags = EngineFlags(expert_placement_strategy="round_robin")
    assert effective_placement(flags, None) == ("linear", None)
