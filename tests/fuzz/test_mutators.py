"""Mutated inputs differ, stay within bounds, and now and then get past all checks."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.fuzz.mutators import end_of, json_mutator, mutate_header, mutate_json
from tests.fuzz.outcome import outcome_of
from tests.fuzz.target import Target, WrongAnswer, check
from tests.fuzz.targets import find_target

ROUNDS = 400
DOCUMENT = {"a": [1, 2, {"b": "x", "c": None}], "d": {"e": True, "f": 0.5}}


def test_a_mutated_document_is_another_one_and_leaves_the_first_as_it_was() -> None:
    before = json.dumps(DOCUMENT)
    made = [json.dumps(mutate_json(DOCUMENT, Random(seed))) for seed in range(ROUNDS)]
    assert json.dumps(DOCUMENT) == before
    assert len(set(made)) > ROUNDS / 2


def test_values_that_mean_something_are_never_changed_themselves() -> None:
    extra = [[0, 1], [2, 3]]
    document = DOCUMENT
    for seed in range(ROUNDS):
        document = mutate_json(document, Random(seed), (extra,))
        if len(json.dumps(document)) > 5000:
            document = DOCUMENT
    assert extra == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", ["header", "config", "expert_map", "layout"])
def test_some_mutated_inputs_are_accepted_and_some_refused(name: str) -> None:
    target, chance = find_target(name), Random(0)
    seeds = list(target.seeds())
    accepted = []
    for _ in range(ROUNDS):
        data = target.mutate(chance.choice(seeds), target.max_bytes, chance)
        if data is not None:
            assert len(data) <= target.max_bytes
            accepted.append(outcome_of(target, data).accepted)
    assert any(accepted)
    assert not all(accepted)


def test_what_is_no_json_is_left_to_the_fuzzer() -> None:
    assert json_mutator()(b"{", 100, Random(0)) is None
    assert mutate_header(b"short", 100, Random(0)) is None


def test_the_end_of_a_header_is_that_of_its_last_tensor() -> None:
    assert end_of({"a": {"data_offsets": [0, 8]}, "b": {"data_offsets": [8, 20]}, "c": None}) == 20


def _of(run: object) -> Target:
    return Target("x", "", run, lambda: (), mutate_header)  # type: ignore[arg-type]


def test_what_is_no_error_of_ours_is_a_finding_with_its_place() -> None:
    def wrong(_: bytes) -> bool:
        check(holds=False, says="accepted twice")
        return True

    finding = outcome_of(_of(wrong), b"").finding
    assert finding is not None
    assert finding.key.startswith(f"{WrongAnswer.__name__} tests/fuzz/")
    assert "accepted twice" in finding.text


def test_a_slow_input_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.5])
    monkeypatch.setattr("tests.fuzz.outcome.time.process_time", lambda: next(clock))
    finding = outcome_of(_of(lambda _: True), b"").finding
    assert finding is not None
    assert finding.key == "too slow"


def test_an_input_that_takes_much_memory_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100 * 2**20, 301 * 2**20])
    monkeypatch.setattr("tests.fuzz.outcome._peak_bytes", lambda: next(peaks))
    finding = outcome_of(_of(lambda _: True), b"").finding
    assert finding is not None
    assert finding.key == "too much memory"
