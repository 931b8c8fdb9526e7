"""The cost of a rebalance: which rearrangements count, and the ratios of their medians."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.eplb_cost import Turns, summarise
from tests.gpu.eplb_report import eplb_part
from tests.gpu.eplb_worker import Rebalancing


class Slots:
    """The manager of four adapters in host memory."""

    def __init__(self) -> None:
        self.active: set[int] = set()

    def list_adapters(self) -> dict[int, None]:
        return dict.fromkeys((4, 2, 1, 3))

    def deactivate_adapter(self, number: int) -> None:
        self.active.discard(number)

    def activate_adapter(self, number: int) -> None:
        self.active.add(number)


class TimedWorker(Rebalancing):
    """The first rearrangement after a change of slots takes 9 s, the others as many as adapters."""

    def __init__(self, slots: Slots | None) -> None:
        self.slots = slots
        lora = SimpleNamespace(_adapter_manager=slots) if slots else None
        self.model_runner: Any = SimpleNamespace(lora_manager=lora)
        self.seeds: list[int] = []

    def rearrange(self, seed: int, repeats: int) -> list[float]:
        self.seeds.append(seed)
        in_use = float(len(self.slots.active)) if self.slots else 0.0
        return [9.0, *[in_use] * (repeats - 1)]


def test_the_first_rearrangement_with_other_slots_is_not_counted() -> None:
    worker = TimedWorker(Slots())
    assert worker.rearrange_with(5, 2, (0, 1, 4)) == {
        "0": [0.0] * 2,
        "1": [1.0] * 2,
        "4": [4.0] * 2,
    }
    assert len(set(worker.seeds)) == 3


def test_an_engine_without_lora_drops_its_first_as_well() -> None:
    assert TimedWorker(None).rearrange_with(5, 2, (0,)) == {"0": [0.0, 0.0]}


def test_processes_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "turn"
    file.write_text("0")
    seen: list[int] = []

    def take(place: int) -> None:
        turns = Turns(file, place, 3)
        for _ in range(4):
            turns.wait()
            seen.append(place)
            turns.end()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(take, (2, 1, 0)))
    assert seen == [0, 1, 2] * 4


def test_ratios_are_of_medians_over_all_turns() -> None:
    with_lora = {"bytes": [100, 10], "seconds": {"0": [2.0, 2.2, 2.0], "4": [3.0, 3.0, 9.0]}}
    without = {"bytes": [100, 0], "seconds": {"0": [1.0, 1.6, 1.7]}}
    summary = summarise(with_lora, without)
    assert summary["without_s"] == 1.6
    assert summary["0 adapters"]["ratio"] == pytest.approx(1.25)
    assert summary["4 adapters"]["ratio"] == pytest.approx(1.875)
    assert summary["4 adapters"]["bytes_ratio"] == pytest.approx(1.4)
    engines = {"torch_nccl:lora": with_lora, "torch_nccl": without, "summary": summary}
    document = {
        "release": "0.33.0",
        "eplb": {"stock": False, "cases": [], "cost": {"torch_nccl": engines}},
    }
    page = eplb_part([document])
    assert "| 0.33.0 | torch_nccl | without LoRA | 1.600 (1.000 to 1.700) | | |" in page
    assert "| 0.33.0 | torch_nccl | 4 | 3.000 (3.000 to 9.000) | 1.88× | 1.40× |" in page
