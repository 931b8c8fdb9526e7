"""Loads, unloads and swaps of 8 adapters on two to four ranks, bad ones mixed in: every slot is right."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES, newest_of, run_in_release

CYCLES = int(os.environ.get("LORASHARD_LOAD_CYCLES", "100"))  # 3,000 take three minutes


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("release", newest_of(PLUGIN_RELEASES))
def test_every_slot_is_right_whatever_was_tried_before(
    release: str, ep_size: int, tmp_path: Path
) -> None:
    def run(ep_rank: int) -> Any:
        script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import many_loads
answer(many_loads.run({ep_rank}, {ep_size}, {str(tmp_path)!r}, {CYCLES}))
"""
        return run_in_release(release, script, timeout_s=900)

    with ThreadPoolExecutor(ep_size) as threads:
        found = list(threads.map(run, range(ep_size)))
    for rank in found:
        assert rank["problems"] == []
        assert rank["tried"] == found[0]["tried"]
        assert min(rank["tried"].values()) >= CYCLES // 25
        assert rank["slowest_s"] < 5
        resident = rank["resident_mb"]
        quarter = len(resident) // 4
        growth = median(resident[-quarter:]) - median(resident[quarter : 2 * quarter])
        assert growth < 2, (growth, resident[:: max(1, quarter // 4)])
        # What an adapter is read into comes back, also after a load that failed.
        assert max(rank["regions"][quarter:]) <= max(rank["regions"][:quarter])
