"""Hundreds of adapter versions inside real vLLM releases, on the CPU: right, and in flat memory."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_release import END_RELEASES, run_in_release

STEPS = 300
SCRIPT = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import swaps
answer(swaps.swap_many({STEPS}))
"""


@pytest.mark.parametrize("release", END_RELEASES)
def test_each_version_is_right_and_memory_is_flat(release: str) -> None:
    found: Any = run_in_release(release, SCRIPT, timeout_s=300)
    assert found["wrong"] == []
    resident = found["resident_mb"]
    growth = median(resident[-20:]) - median(resident[20:40])
    # A version that stays behind, or a copy of it, would be all of this.
    assert growth < 0.05 * found["mb_a_step"] * (STEPS - 40), (growth, found["mb_a_step"])
