"""Adapters come and go while requests run: what vLLM's own executor and model runners make of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm_release import END_RELEASES, answers_of

each_release = pytest.mark.parametrize("release", END_RELEASES)


def answers(release: str) -> dict[str, Any]:
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.swapped_adapters")
    return found


@each_release
def test_after_a_refusal_the_next_call_gets_its_own_answers(release: str) -> None:
    refusal, of_next, held = answers(release)["refused"]
    assert "absent" in refusal
    assert of_next is True
    assert held == [[2], [2]]


@each_release
def test_without_the_patch_the_next_call_gets_the_refusal_once_more(release: str) -> None:
    refusal, of_next, _ = answers(release)["refused, stock"]
    assert "absent" in refusal
    assert "absent" in of_next


@each_release
def test_a_step_activates_both_versions_of_a_name(release: str) -> None:
    found = answers(release)
    assert len(found["two versions"]) == 4
    assert all(active == [1, 2] for active in found["two versions"].values()), found
    assert found["by name alone"] is True
