"""Unloading in a whole engine core: nothing stays, nobody is disturbed, nothing stale is served."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm_release import END_RELEASES, answers_of

ON_BOTH, ON_NONE = [[1], [1]], [[], []]
RIGHT = [[], []]  # nothing wrong on any rank
PROMPT = 32  # tokens of it that a cache of whole blocks can have

each_release = pytest.mark.parametrize("release", END_RELEASES)


def answers(release: str) -> dict[str, Any]:
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.unloading")
    return found


@each_release
def test_it_works_where_vllm_loads_the_plugin_while_it_makes_its_engine_core(release: str) -> None:
    assert answers(release)["loaded by vLLM"] is True


@each_release
def test_an_adapter_that_nobody_uses_leaves_every_rank_at_once(release: str) -> None:
    removed, left, buffers_are_back, held = answers(release)["idle"]
    assert (removed, left) == ([True, False], ON_NONE)
    assert (buffers_are_back, held) == (True, [1, 1])


@each_release
def test_an_adapter_in_use_leaves_with_its_last_request(release: str) -> None:
    found = answers(release)
    for scheduled in ("in use", "in use, asynchronous"):
        assert found[scheduled] == [True, ON_BOTH, ON_NONE, True]
        assert found[f"{scheduled}, stock"].startswith("the engine ends")
    assert found["aborted"] == [ON_BOTH, ON_NONE]


@each_release
def test_a_request_that_comes_after_its_adapter_was_unloaded_and_deleted_is_served(
    release: str,
) -> None:
    assert answers(release)["late"] == [[1, ON_BOTH], ON_NONE]


@each_release
def test_new_weights_under_the_number_of_an_adapter_in_use_are_served_at_once(
    release: str,
) -> None:
    assert answers(release)["add_lora"] == [RIGHT, ON_BOTH]  # it was loaded again, so it stays
    assert answers(release)["a request"] == [RIGHT, ON_NONE]


@each_release
def test_a_version_in_place_of_another_is_served_and_nothing_of_the_other(release: str) -> None:
    found = answers(release)["in place"]
    assert found in ("not in this release", [RIGHT, [0, 0, PROMPT]])


@each_release
def test_an_adapter_under_the_name_of_another_gets_nothing_that_the_other_has_cached(
    release: str,
) -> None:
    found = answers(release)
    assert found["prefixes"]["a1"] == [0, PROMPT, 0, PROMPT]
    assert found["prefixes, stock"]["a1"] == [0, PROMPT, PROMPT, PROMPT]
    for untouched in ("a2", "base"):
        assert found["prefixes"][untouched] == [0, PROMPT, PROMPT, PROMPT]


@each_release
def test_the_servers_endpoint_reaches_the_engine(release: str) -> None:
    (added, removed, unknown, again), wrong = answers(release)["served"]
    assert (added[1], removed[1], unknown[1], again[1]) == (ON_BOTH, ON_NONE, ON_NONE, [[2], [2]])
    assert removed[0] == "Success: LoRA adapter 'mine' removed successfully."
    assert unknown[0] == "The lora adapter 'mine' cannot be found."
    assert wrong == RIGHT
    assert answers(release)["served, stock"][0][1][1] == ON_BOTH


@each_release
def test_without_expert_parallelism_all_is_as_in_vllm(release: str) -> None:
    assert answers(release)["without EP"] == [True, [[]], False]


@each_release
def test_a_scheduler_that_extends_vllms_is_no_harm_as_long_as_it_calls_it(release: str) -> None:
    assert answers(release)["subclass"] == ["add_request True", "_free_request False"]
