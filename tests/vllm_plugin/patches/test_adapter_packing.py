"""Adapters that come about without the loader, inside real vLLM releases on the CPU."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.patched_answers import answers
from tests.vllm_release import PLUGIN_RELEASES


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_a_rank_without_trained_experts_may_be_given_no_tensors(release: str) -> None:
    found = answers(release)["no_tensors_on_this_rank"]
    assert (found["before"], found["after"]) == ("loaded", "loaded")
    assert found["left"] == []
    assert found["warnings"] == ["lorashard: adapter 2: no tensors were given on ep rank 0"]
