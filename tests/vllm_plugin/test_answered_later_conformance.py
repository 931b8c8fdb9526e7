"""An adapter is added or removed between two steps of the workers, and vLLM's engine goes on scheduling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.cases import release_key
from tests.vllm_release import END_RELEASES, answers_of

each_release = pytest.mark.parametrize("release", END_RELEASES)
BOTH = [[1, 2], [1, 2]]  # on either rank


def answers(release: str) -> dict[str, Any]:
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.answered_later")
    return found


def next_step(release: str) -> str:
    takes_futures = release_key(release) >= release_key("0.17.1")
    return "execute_model" if takes_futures else "nothing, in this release"


@each_release
@pytest.mark.parametrize("mode", ["steps", "steps, asynchronous"])
def test_the_next_step_is_scheduled_before_the_workers_have_answered(
    release: str, mode: str
) -> None:
    behind, added, held, listed = answers(release)[mode]
    assert behind == next_step(release)
    assert added is True
    assert held == [[1], [1]]
    assert listed == [1]


@each_release
def test_the_next_step_is_scheduled_before_an_adapter_is_gone(release: str) -> None:
    behind, removed, held, removed_again = answers(release)["removed"]
    assert behind == next_step(release)
    assert (removed, held, removed_again) == (True, [[], []], False)


@each_release
def test_an_adapter_goes_with_its_last_request(release: str) -> None:
    assert answers(release)["removed last"] == [True, [[], []]]


@each_release
def test_an_idle_engine_answers_too(release: str) -> None:
    assert answers(release)["idle"] == [[True, True], BOTH]
    assert answers(release)["last"] == [True, 60, BOTH]


@each_release
def test_more_calls_than_the_queues_have_places_are_all_answered(release: str) -> None:
    assert answers(release)["many"] == [True, BOTH]


@each_release
def test_a_refusal_is_told_and_the_next_call_has_its_own_answer(release: str) -> None:
    refusal, of_next, held = answers(release)["refused"]
    assert "absent" in refusal
    assert refusal.startswith("Call to add_lora method failed: Worker failed with error")
    assert of_next is True
    assert held == [[2], [2]]


@each_release
def test_a_client_in_the_same_process_gets_the_answer_itself(release: str) -> None:
    assert answers(release)["in its client"] is True
    assert answers(release)["patched"] is True


@each_release
def test_another_packages_way_of_adding_is_not_passed_by(release: str) -> None:
    names = ["add_lora", "remove_lora"]
    assert answers(release)["another package"] == [[True, True], names]
