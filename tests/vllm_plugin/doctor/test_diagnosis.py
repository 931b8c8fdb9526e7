"""The report as a whole: what the parts say is put together, and `ok` means no problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.options import LayoutOptions
from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter
from lorashard.vllm_plugin.doctor.diagnosis import Report, diagnose
from lorashard.vllm_plugin.doctor.findings import Installation, PatchState, SurveyedAdapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from tests.tiny import save_adapter

HERE = Installation(
    lorashard="1", python="3.11", executable="python", torch="2.9", vllm="0.33.0",
    entry_point=True, allowed=True, variables={}, switched_on=(), unknown=(), faults=(),
)  # fmt: skip
EP = EngineFlags(tensor_parallel_size=2, enable_expert_parallel=True)
DP_RISK = "LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL"
EPLB_RISK = "LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE"


@pytest.fixture
def shards(tmp_path: Path) -> SurveyedAdapter:
    split_adapter(save_adapter(tmp_path / "plain"), tmp_path / "shards", SplitRequest(2))
    return survey_adapter(tmp_path / "shards", LayoutOptions(), expert_parallel=True)


def report(
    flags: EngineFlags = EP, adapter: SurveyedAdapter | None = None, **changes: Any
) -> Report:
    return diagnose(replace(HERE, **changes), [], flags, None, adapter)


def test_a_sound_engine_is_ok() -> None:
    sound = report()
    assert (sound.ok, sound.problems, sound.refusals, sound.notes) == (True, (), (), ())
    assert (sound.vllm_known, sound.ep_size, sound.placement) == (True, 2, "linear")
    assert (sound.adapter, sound.outcome, sound.as_placed) == (None, None, None)


def test_a_refused_engine_is_not_ok_and_says_so_once() -> None:
    refused = report(replace(EP, enable_eplb=True), vllm="0.23.0")
    assert not refused.ok
    assert [(r.variable, r.overridden) for r in refused.refusals] == [(EPLB_RISK, False)]
    assert [problem.about for problem in refused.problems] == ["flags"]
    assert ["nixl" in note for note in refused.notes] == [True]


def test_an_overridden_refusal_is_a_note_and_no_problem() -> None:
    allowed = report(replace(EP, enable_eplb=True), vllm="0.23.0", switched_on=(EPLB_RISK,))
    assert allowed.ok
    assert [(r.variable, r.overridden) for r in allowed.refusals] == [(EPLB_RISK, True)]
    assert [EPLB_RISK in note for note in allowed.notes] == [True, False]


def test_eplb_is_refused_where_its_patches_cannot_be_applied() -> None:
    missing = PatchState(
        "vllm.x.y",
        "unsupported",
        "there is no function y",
        "",
        "",
        "",
        "0.24.0",
        None,
        "--enable-eplb",
    )
    flags = replace(EP, enable_eplb=True)
    assert diagnose(HERE, [], flags, None, None).ok
    (refused,) = diagnose(HERE, [missing], flags, None, None).refusals
    assert refused.variable == EPLB_RISK
    assert "vllm.x.y: there is no function y." in refused.reason
    assert diagnose(HERE, [missing], EP, None, None).ok


@pytest.mark.parametrize(
    ("changes", "vllm", "named"),
    [
        ({"max_loras": 1}, "0.24.0", "--max-loras of at least"),
        ({"enable_eplb": True}, "0.33.0", "--enable-eplb"),
        ({"tensor_parallel_size": 2}, "0.33.0", "-tp above 1"),
        ({}, "0.23.0", "vLLM 0.24.0 or later"),
    ],
)
def test_data_parallelism_is_refused_where_engines_cannot_agree(
    changes: dict[str, Any], vllm: str, named: str
) -> None:
    flags = EngineFlags(1, data_parallel_size=2, enable_expert_parallel=True, max_loras=2)
    refusals = report(replace(flags, **changes), vllm=vllm).refusals
    assert [r.variable for r in refusals] == [DP_RISK]
    assert named in refusals[0].reason


def test_data_parallelism_is_served_where_engines_can_agree() -> None:
    flags = EngineFlags(1, data_parallel_size=2, enable_expert_parallel=True, max_loras=2)
    assert report(flags, vllm="0.24.0").refusals == ()


def test_data_parallelism_is_refused_where_its_patches_cannot_be_applied() -> None:
    missing = PatchState(
        "vllm.x.y", "unsupported", "no y", "", "", "", "0.24.0", None, "--data-parallel-size"
    )
    flags = EngineFlags(1, data_parallel_size=2, enable_expert_parallel=True, max_loras=2)
    (refused,) = diagnose(HERE, [missing], flags, None, None).refusals
    assert (refused.variable, "vllm.x.y: no y." in refused.reason) == (DP_RISK, True)
    assert diagnose(HERE, [missing], replace(EP, enable_eplb=True), None, None).ok


def test_an_adapters_outcome_and_summary_are_in_the_report(shards: SurveyedAdapter) -> None:
    placed = report(adapter=shards)
    assert (placed.ok, placed.as_placed, placed.adapter) == (True, True, shards.summary)
    assert placed.outcome is not None
    assert placed.outcome.startswith("each rank reads its own file, ")


def test_strict_is_read_from_the_installation(shards: SurveyedAdapter) -> None:
    flags = replace(EP, tensor_parallel_size=4)
    assert report(flags, shards).ok
    strict = report(flags, shards, switched_on=("LORASHARD_STRICT",))
    assert [problem.about for problem in strict.problems] == ["adapter"]
    assert (strict.outcome, strict.as_placed) == (None, False)


def test_problems_are_in_the_order_of_installation_flags_adapter(shards: SurveyedAdapter) -> None:
    flags = replace(EP, data_parallel_size=2, max_lora_rank=1)
    found = report(flags, shards, vllm=None, entry_point=False)
    assert [problem.about for problem in found.problems] == ["vllm", "plugin", "flags", "adapter"]
    assert found.vllm_known is None


def test_the_note_on_the_placement_is_there() -> None:
    (note,) = report(replace(EP, expert_placement_strategy="round_robin")).notes
    assert "`model`" in note


def test_what_only_a_loaded_model_shows_is_there_with_expert_parallelism() -> None:
    assert len(report().known_once_loaded) == 2
    assert report(EngineFlags()).known_once_loaded == ()
