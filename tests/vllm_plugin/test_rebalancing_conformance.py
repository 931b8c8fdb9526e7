"""EPLB's own functions move experts, in 2 and 4 workers, and every LoRA slot stays right.

See rebalancing.py. In the newest release, or in those of LORASHARD_RELEASES in which LoRA can follow.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from tempfile import mkdtemp
from typing import Any

import pytest

from lorashard.vllm_plugin.doctor.releases import FIRST_WITH_EPLB, release_number
from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES, newest_of, record, run_in_release

WITH_EPLB = tuple(r for r in PLUGIN_RELEASES if (release_number(r) or (0,)) >= FIRST_WITH_EPLB)
RELEASES = newest_of(WITH_EPLB)
ON_TWO_RANKS = (
    "sync", "sync_without_redundant", "thread", "points", "read_ahead", "shared_factors", "sequences",
    "traffic", "after_a_failure", "profile", "published_maps",
    "redundant_experts_without_weights",
)  # fmt: skip
ON_FOUR_RANKS = ("sync", "thread", "sequences")

pytestmark = pytest.mark.parametrize("release", RELEASES)


@cache
def findings(release: str, ep_size: int, checks: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each rank finds; all checks in one set of processes, since importing vLLM takes seconds."""
    folder = mkdtemp()

    def run(ep_rank: int) -> Any:
        script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import rebalancing
answer(rebalancing.run({ep_rank}, {ep_size}, {folder!r}, {list(checks)!r}))
"""
        return run_in_release(release, script, timeout_s=600)

    with ThreadPoolExecutor(ep_size) as threads:
        found = list(threads.map(run, range(ep_size)))
    record(release, f"rebalancing-{ep_size}", found[0])
    return found


@pytest.mark.parametrize("check", ON_TWO_RANKS)
def test_every_slot_holds_the_lora_of_its_expert_on_two_ranks(release: str, check: str) -> None:
    assert [found[check] for found in findings(release, 2, ON_TWO_RANKS)] == [[], []]


@pytest.mark.parametrize("check", ON_FOUR_RANKS)
def test_every_slot_holds_the_lora_of_its_expert_on_four_ranks(release: str, check: str) -> None:
    assert [found[check] for found in findings(release, 4, ON_FOUR_RANKS)] == [[]] * 4
