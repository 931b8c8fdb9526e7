"""Beside other packages that patch the same methods, in real vLLM releases, on the CPU: nothing is wrong.

Their own code runs, as it is installed; SkyRL's wrap and prime-rl's plugin are not released, so what
they replace is rebuilt.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_plugin.beside_packages import NAMES
from tests.vllm_release import PLUGIN_RELEASES, run_in_release

# All of them where releases are named, as `make compat` does; else those that differ most.
RUNS = [
    (release, package, plugin_first)
    for release in PLUGIN_RELEASES
    for package in NAMES
    for plugin_first in (False, True)
    if "LORASHARD_RELEASES" in os.environ
    or (release == PLUGIN_RELEASES[0] and (package == "verl" or not plugin_first))
    or (package == "AReaL" and not plugin_first)
]
LOADS = {"AReaL": 52, "prime-rl's plugin": 104}  # the others: 208
VERL_BEGINS = (0, 18)


def found(release: str, package: str, *, plugin_first: bool) -> dict[str, Any]:
    script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import beside
answer(beside.run({package!r}, {plugin_first}))
"""
    result: dict[str, Any] = run_in_release(release, script)
    return result


@pytest.mark.parametrize(("release", "package", "plugin_first"), RUNS)
def test_no_load_is_wrong(release: str, package: str, plugin_first: bool) -> None:
    if package == "verl" and tuple(map(int, release.split(".")))[:2] < VERL_BEGINS:
        with pytest.raises(AssertionError, match="Currently supported vllm versions are"):
            found(release, package, plugin_first=plugin_first)
        return
    result = found(release, package, plugin_first=plugin_first)
    assert result["wrong"] == []
    assert result["checked"] == LOADS.get(package, 208)


def test_what_would_be_missed_is_refused_by_the_name_of_what_stands_there() -> None:
    script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import beside
answer(beside.displaced())
"""
    said = run_in_release(PLUGIN_RELEASES[0], script)
    for when in ("at the start", "at a load"):
        assert "vllm.lora.model_manager.LoRAModelManager._add_adapter is " in said[when]
        assert "somebodys_add_adapter (" in said[when]
        assert "set LORASHARD_RISK_PATCHED_BY_OTHERS=1" in said[when]
    assert said["accepted"] == "loaded"
    assert said["calls ours"] == "loaded"
    assert said["foreign"] == [
        "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager._load_adapter is somebodys_load_adapter"
    ]


def test_without_the_plugin_there_is_something_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LORASHARD_DISABLE", "1")
    newest = max(PLUGIN_RELEASES, key=lambda release: tuple(map(int, release.split("."))))
    result = found(newest, "verl", plugin_first=True)  # verl is for 0.18 and later
    uneven = [line for line in result["wrong"] if "as tensors on 2d" in line]
    assert len(uneven) > 10
