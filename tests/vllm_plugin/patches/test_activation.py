"""Sleep mode takes the memory of the slots: nothing may be written into one from then on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorashard.vllm_plugin.load.slot_ahead import SlotAhead, Withdrawn
from lorashard.vllm_plugin.patches import adapter_loading
from lorashard.vllm_plugin.patches.activation import wrap_sleep

CPU = torch.device("cpu")


def worker(slot: SlotAhead | None) -> Any:
    loader = SimpleNamespace(slot_ahead=slot, device=CPU)
    manager = SimpleNamespace(**{adapter_loading._LOADER: loader})
    return SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))


def test_a_slot_that_is_being_written_is_given_up_before_its_memory_is() -> None:
    slot = SlotAhead(0, CPU)
    slot.write(lambda modules: dict(modules.items()), {"a": 1}, None)
    assert slot.is_ready
    parts = slot._parts({"b": 2})  # of a thread that goes on

    def sleep(_: Any, level: int) -> int:
        with pytest.raises(Withdrawn):
            next(parts)
        return level

    assert wrap_sleep(sleep)(worker(slot), 2) == 2
    assert not slot.is_ready


@pytest.mark.parametrize("of", [worker(None), SimpleNamespace(model_runner=SimpleNamespace())])
def test_without_such_a_slot_sleep_is_vllms_own(of: Any) -> None:
    assert wrap_sleep(lambda _, level: level)(of, level=1) == 1
