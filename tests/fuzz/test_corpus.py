"""Every input that the fuzzer has kept, once more: no finding, and two readings agree. No atheris needed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters import Spec, build
from tests.fuzz.corpus import KEPT, kept_inputs, unpack, write_inputs
from tests.fuzz.layout import document_of
from tests.fuzz.outcome import outcome_of
from tests.fuzz.readings import compare_readings
from tests.fuzz.record import Figures, add_run, read_record, write_record
from tests.fuzz.targets import NAMES, find_target
from tests.strategies import specs
from tests.tiny import REPO
from tests.vllm_release import run_in_release

IN_PROCESS = tuple(name for name in NAMES if name != "load")
MOST_BYTES = 1_000_000  # of all kept inputs together

LOAD = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.fuzz.test_corpus import findings_of
answer(findings_of("load"))
"""


def findings_of(name: str) -> list[str]:
    """What the seeds and the kept inputs of a target lead to that must not be."""
    target = find_target(name)
    seeds = tuple(target.seeds())
    inputs = (*seeds, *kept_inputs(name))
    outcomes = [outcome_of(target, data) for data in inputs]
    if not any(outcome.accepted for outcome in outcomes):
        return ["nothing was accepted"]
    return [outcome.finding.text for outcome in outcomes if outcome.finding is not None]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_kept_input_is_accepted_or_refused_with_our_errors(name: str) -> None:
    assert kept_inputs(name)
    assert findings_of(name) == []


def test_hostile_folders_leave_a_server_alive() -> None:
    assert kept_inputs("load")
    assert run_in_release("0.33.0", LOAD) == []


def test_two_readings_agree_on_every_adapter_that_the_fuzzer_has_found(tmp_path: Path) -> None:
    inputs = (*find_target("layout").seeds(), *kept_inputs("layout"))
    came_to: Counter[str] = Counter()
    for number, data in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        compared = compare_readings(json.loads(data), folder)
        came_to.update({"split": compared.was_split, "converted": compared.converted})
    assert came_to["split"] > 60
    assert came_to["converted"] > 60


@given(spec=specs(), ep_size=st.integers(1, 4), cast=st.sampled_from([None, None, "BF16"]))
@settings(max_examples=40, deadline=None)
def test_two_readings_agree_on_any_adapter(spec: Spec, ep_size: int, cast: str | None) -> None:
    document = document_of(build(spec)) | {"ep_size": ep_size, "dtype": cast}
    with TemporaryDirectory() as folder:
        compared = compare_readings(document, Path(folder))
    assert compared.was_split


def test_the_kept_inputs_are_few_and_each_is_there_once() -> None:
    assert sum(path.stat().st_size for path in KEPT.iterdir()) < MOST_BYTES
    assert {path.stem for path in KEPT.iterdir()} == set(NAMES)
    for name in NAMES:
        assert len(set(kept_inputs(name))) == len(kept_inputs(name))


def test_inputs_are_kept_byte_for_byte(tmp_path: Path) -> None:
    inputs = (bytes(range(256)), b"", b"\r\n\xe2\x80\xa8\x85")
    write_inputs(tmp_path / "x.jsonl", inputs)
    assert set(kept_inputs("x", tmp_path)) == set(inputs)
    unpack(inputs, tmp_path / "files")
    assert {path.read_bytes() for path in (tmp_path / "files").iterdir()} == set(inputs)


def test_runs_add_up_in_the_record(tmp_path: Path) -> None:
    record = add_run({}, "header", Figures(10, 2, 3, 4, 1))
    write_record(add_run(record, "header", Figures(5, 1, 1, 9, 0)), tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == {"header": Figures(15, 3, 4, 9, 0)}
