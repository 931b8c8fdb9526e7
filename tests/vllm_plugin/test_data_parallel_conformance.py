"""Data-parallel engines that share experts: the faults of stock vLLM, and that they are gone.

See data_parallel.py. In the newest release, or in those of LORASHARD_RELEASES with such engines.
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

SUPPORTED = tuple(r for r in PLUGIN_RELEASES if (release_number(r) or (0,)) >= FIRST_WITH_EPLB)
RELEASES = newest_of(SUPPORTED)
FAULTS = (
    "slots_of_each", "idle_engine", "others_tokens", "stale_mapping", "graph_of_own", "too_many",
)  # fmt: skip
MORE = (
    "late_and_gone", "new_version", "same_number_again", "cannot_load", "two_names", "no_further_exchange",
    "random_steps", "sequences",
)  # fmt: skip
ON_FOUR = ("slots_of_each", "others_tokens", "random_steps", "sequences")

pytestmark = [
    pytest.mark.parametrize("release", RELEASES),
    pytest.mark.parametrize("version", [1, 2]),
]


@cache
def findings(
    release: str, version: int, size: int, checks: tuple[str, ...], *, stock: bool = False
) -> list[dict[str, Any]]:
    """What each engine finds; all checks in one set of processes, since importing vLLM takes seconds."""
    folder = mkdtemp()

    def run(rank: int) -> Any:
        script = f"""
import os, sys; sys.path.insert(0, {str(REPO)!r})
os.environ["LORASHARD_DISABLE"] = {str(int(stock))!r}
from tests.vllm_plugin import data_parallel
answer(data_parallel.run({rank}, {size}, {folder!r}, {version}, {list(checks)!r}))
"""
        return run_in_release(release, script, timeout_s=600)

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(run, range(size)))
    if not stock:
        record(release, f"data-parallel-{version}-{size}", found[0])
    return found


@cache
def scheduled(release: str, *, stock: bool) -> list[list[int]]:
    """The adapters in the first steps of a scheduler with three requests, three adapters and two slots."""
    script = f"""
import os, sys; sys.path.insert(0, {str(REPO)!r})
os.environ["LORASHARD_DISABLE"] = {str(int(stock))!r}
from types import SimpleNamespace
from tests.vllm_plugin import engine_core as ec
from vllm.lora.request import LoRARequest
core = ec.engine_core(num_engines=2)
for number in (1, 2, 3):
    ec.send(core, str(number), LoRARequest(f"a{{number}}", number, "/nowhere"), 4)
found = []
for _ in range(2):
    step = core.scheduler.schedule()
    found.append(sorted(int(name) for name in step.num_scheduled_tokens))
answer(found)
"""
    found: list[list[int]] = run_in_release(release, script)
    return found


def test_a_scheduler_uses_its_engines_share_of_the_slots(release: str, version: int) -> None:
    assert scheduled(release, stock=True)[0] == [1, 2]  # and the other engine two others
    assert scheduled(release, stock=False)[0] == [1]


@pytest.mark.parametrize("check", FAULTS)
def test_stock_vllm_has_each_fault(release: str, version: int, check: str) -> None:
    found = findings(release, version, 2, FAULTS, stock=True)
    assert any(of_engine[check] for of_engine in found)


@pytest.mark.parametrize("check", [*FAULTS, *MORE])
def test_two_engines_agree(release: str, version: int, check: str) -> None:
    found = findings(release, version, 2, (*FAULTS, *MORE))
    assert [of_engine[check] for of_engine in found] == [[], []]


@pytest.mark.parametrize("check", ON_FOUR)
def test_four_engines_agree(release: str, version: int, check: str) -> None:
    found = findings(release, version, 4, ON_FOUR)
    assert [of_engine[check] for of_engine in found] == [[]] * 4
