"""What is said although nothing is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorashard.vllm_plugin.doctor.findings import (
    PLAIN_ADAPTER,
    SHARDS,
    AdapterSummary,
    Installation,
    SurveyedAdapter,
)
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.notes import (
    adapter_notes,
    flag_notes,
    installation_notes,
    unknown_until_loaded,
)
from lorashard.vllm_plugin.doctor.releases import Release
from lorashard.vllm_plugin.engine.guards import Refusal

HERE = Installation(
    lorashard="1", python="3.11", executable="python", torch="2.9", vllm="0.33.0",
    entry_point=True, allowed=True, variables={}, switched_on=(), unknown=(), faults=(),
)  # fmt: skip
EP = EngineFlags(tensor_parallel_size=2, enable_expert_parallel=True)


def surveyed(**fields: object) -> SurveyedAdapter:
    summary = AdapterSummary("some/adapter", PLAIN_ADAPTER)
    return SurveyedAdapter(replace(summary, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("vllm", ["0.15.1", "0.99.0", "?"])
def test_a_vllm_that_is_not_tested_is_noted(vllm: str) -> None:
    (note,) = installation_notes(replace(HERE, vllm=vllm))
    assert note == f"lorashard is not tested with vLLM {vllm}, only with 0.16.0 to 0.33.0."


@pytest.mark.parametrize("vllm", ["0.33.0+cu129", None])
def test_a_tested_vllm_and_none_at_all_are_not(vllm: str | None) -> None:
    assert list(installation_notes(replace(HERE, vllm=vllm))) == []


def test_variables_that_nothing_reads_are_named() -> None:
    unknown = replace(HERE, unknown=("LORASHARD_STRIKT", "LORASHARD_THREAD"))
    assert [note.partition(" ")[0] for note in installation_notes(unknown)] == list(unknown.unknown)


def test_an_overridden_refusal_is_noted_with_its_reason() -> None:
    (note,) = flag_notes(EP, [Refusal("x-y", "LORASHARD_RISK_X", "It is wrong.", "Do not.")])
    assert note == "LORASHARD_RISK_X is set, so vLLM starts anyway: It is wrong."


def test_flags_that_do_less_than_one_might_think_are_noted() -> None:
    assert list(flag_notes(EP, [])) == []
    (alone,) = flag_notes(EngineFlags(enable_expert_parallel=True), [])
    assert "-tp N" in alone
    (sharded,) = flag_notes(replace(EP, fully_sharded_loras=True), [])
    assert sharded.startswith("--fully-sharded-loras: ")
    assert list(flag_notes(EngineFlags(fully_sharded_loras=True), [])) == []


def test_shards_without_expert_parallelism_are_noted() -> None:
    shards = surveyed(kind=SHARDS, ranks=((0,), (1,)))
    assert len(list(adapter_notes(shards, EngineFlags()))) == 1
    assert list(adapter_notes(shards, EP)) == []


@pytest.mark.parametrize(
    ("lora_rank", "separate_gate", "needed"),
    [(8, True, None), (9, True, "32"), (16, True, "32"), (40, True, "128"), (16, False, None)],
)
def test_separate_gates_need_twice_the_room_in_some_models(
    lora_rank: int, separate_gate: bool, needed: str | None
) -> None:
    adapter = surveyed(lora_rank=lora_rank, separate_gate=separate_gate)
    notes = list(adapter_notes(adapter, replace(EP, max_lora_rank=16)))
    assert [f"--max-lora-rank {needed} for it" in note for note in notes] == [True] * (
        needed is not None
    )


def test_an_adapter_that_needs_its_model_is_noted_with_the_first_line_of_the_reason() -> None:
    adapter = replace(surveyed(error="two readings.\n  Give --orientation."), needs_model=True)
    assert list(adapter_notes(adapter, EP)) == [
        "some/adapter cannot be judged without its model (--model): two readings."
    ]
    assert list(adapter_notes(replace(adapter, needs_model=False), EP)) == []


@pytest.mark.parametrize(
    ("release", "count"),
    [(None, 4), ((0, 19, 1), 4), ((0, 20, 0), 3), ((0, 25, 0), 3), ((0, 25, 1), 2)],
)
def test_faults_of_older_releases_are_open_until_they_were_mended(
    release: Release | None, count: int
) -> None:
    assert len(list(unknown_until_loaded(release))) == count
