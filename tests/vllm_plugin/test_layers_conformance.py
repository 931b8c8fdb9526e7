"""MoE layers with LoRA inside real vLLM releases, on the CPU: kernels, warm-up, what LoRA reads.

The releases are those of test_loading_conformance.py; see layers.py for the checks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from lorashard.vllm_plugin.patches.table import PATCHES
from tests.vllm_release import PLUGIN_RELEASES, answers_of, record

pytestmark = pytest.mark.parametrize("release", PLUGIN_RELEASES)


@cache
def findings(release: str) -> dict[str, Any]:
    """What layers.py finds in a release."""
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.layers", timeout_s=600)
    record(release, "layers", found)
    return found


@pytest.mark.parametrize(
    "check",
    [
        "selects_its_kernel",
        "cuts_for_tensor_parallelism",
        "warms_up",
        "loads_on_ranks_without_experts",
        "refuses_data_parallel_dispatch",
        "rearranged_weights",
        "lora_reads_what_the_layer_was_given",
        "asks_the_op_for_global_experts",
        "adds_nothing_where_there_is_nothing",
    ],
)
def test_nothing_is_wrong(release: str, check: str) -> None:
    assert findings(release)[check] == []


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def test_a_patch_is_applied_in_the_releases_that_its_record_names(release: str) -> None:
    # Before its first release, the option that a patch is for is refused, so it may be there and idle.
    idle = {p.target for p in PATCHES if p.only_for and number(release) < number(p.since)}
    expected = {
        patch.target: number(patch.since) <= number(release) <= number(patch.until or release)
        for patch in PATCHES
        if patch.target not in idle
    }
    states = {
        target: state
        for target, state in findings(release)["patch_states"].items()
        if target not in idle
    }
    assert {target: state == "applied" for target, state in states.items()} == expected
    assert set(states.values()) <= {"applied", "not needed", "no such module"}
