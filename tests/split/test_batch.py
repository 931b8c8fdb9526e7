"""Many adapters split from Python: an outcome for each, and one failure does not stop the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard import Part, SplitRequest, split_adapters, verify_shards
from lorashard.errors import AdapterError, OutputExistsError, ShardError
from lorashard.split.batch import AdapterOutcome
from tests.tiny import per_expert_tensors, save_adapter, save_config

REQUEST = SplitRequest(ep_size=2)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three adapters, the second of them without weights."""
    for number in (0, 2):
        save_adapter(tmp_path / "runs" / f"step-{number}", per_expert_tensors(seed=number))
    save_config(tmp_path / "runs" / "step-1")
    return tmp_path / "runs"


def statuses(outcomes: tuple[AdapterOutcome, ...]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_each_adapter_has_an_outcome_in_the_order_named(runs: Path, tmp_path: Path) -> None:
    seen: list[AdapterOutcome] = []
    outcomes = split_adapters([f"{runs}/*"], tmp_path / "out", REQUEST, finished=seen.append)
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert sorted(seen, key=str) == sorted(outcomes, key=str)
    assert [outcome.target.name for outcome in outcomes] == [f"step-{n}-ep2" for n in range(3)]
    assert isinstance(outcomes[1].error, AdapterError)
    assert "no adapter_model.safetensors" in outcomes[1].error.message
    for number in (0, 2):
        shards = tmp_path / "out" / f"step-{number}-ep2"
        assert verify_shards(shards, against=runs / f"step-{number}") == ()


def test_the_results_hold_no_manifests(runs: Path, tmp_path: Path) -> None:
    (outcome,) = split_adapters([runs / "step-0"], tmp_path / "out", REQUEST)
    assert outcome.result is not None
    assert outcome.result.manifest is None


def test_without_a_target_shards_are_written_beside_their_adapters(runs: Path) -> None:
    split_adapters([runs / "step-0", runs / "step-2"], None, REQUEST)
    assert {"step-0-ep2", "step-2-ep2"} <= set(os.listdir(runs))


def test_a_second_run_skips_what_is_done_and_ignores_shards_among_the_adapters(runs: Path) -> None:
    names = [runs / "step-0", runs / "step-2"]
    split_adapters(names, None, REQUEST)
    again = split_adapters([*names, runs / "step-0-ep2"], None, REQUEST, resume=True)
    assert statuses(again) == ["skipped", "skipped", "ignored"]
    assert again[2].result is again[2].error is None


def test_a_target_in_the_way_is_a_failure_of_its_adapter_alone(runs: Path, tmp_path: Path) -> None:
    names = [runs / "step-0", runs / "step-2"]
    split_adapters(names[:1], tmp_path / "out", REQUEST)
    outcomes = split_adapters(names, tmp_path / "out", REQUEST)
    assert statuses(outcomes) == ["failed", "done"]
    assert isinstance(outcomes[0].error, OutputExistsError)
    assert statuses(split_adapters(names, tmp_path / "out", REQUEST, force=True)) == ["done"] * 2


def test_adapters_that_cannot_be_told_apart_or_found_are_refused(runs: Path) -> None:
    save_adapter(runs / "other" / "step-0")
    with pytest.raises(ShardError, match="would both be written"):
        split_adapters([runs / "step-0", runs / "other" / "step-0"], runs / "out", REQUEST)
    with pytest.raises(AdapterError, match="no adapter matches"):
        split_adapters([f"{runs}/x*"], None, REQUEST)
    with pytest.raises(AdapterError, match="No adapter is named"):
        split_adapters([], None, REQUEST)


def test_a_part_has_its_adapters_and_no_others(runs: Path, tmp_path: Path) -> None:
    names = [runs / f"step-{number}" for number in range(3)]
    outcomes = split_adapters(names, tmp_path / "out", REQUEST, part=Part(0, 2))
    assert [Path(outcome.adapter).name for outcome in outcomes] == ["step-0", "step-2"]
    assert statuses(split_adapters(names, tmp_path / "out", REQUEST, part=Part(1, 2))) == ["failed"]
    assert split_adapters(names, tmp_path / "out", REQUEST, part=Part(7, 8)) == ()
    assert sorted(os.listdir(tmp_path / "out")) == ["step-0-ep2", "step-2-ep2"]


def test_two_adapters_with_one_target_are_told_in_every_part(runs: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other" / "step-0")
    names = [runs / "step-0", runs / "step-2", other]
    for index in range(3):
        with pytest.raises(ShardError, match="would both be written"):
            split_adapters(names, tmp_path / "out", REQUEST, part=Part(index, 3))


@pytest.mark.parametrize("name", ["{}/*", "file://{}/*", "hf://collections/owner/name"])
def test_a_part_of_what_may_change_is_refused(runs: Path, tmp_path: Path, name: str) -> None:
    names = [str(runs / "step-0"), name.format(runs)]
    with pytest.raises(AdapterError, match="each adapter is named"):
        split_adapters(names, tmp_path / "out", REQUEST, part=Part(0, 2))
    assert not (tmp_path / "out").exists()
