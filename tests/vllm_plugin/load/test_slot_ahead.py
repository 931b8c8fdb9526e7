"""A slot that is written ahead: whole, or withdrawn between two modules."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lorashard.vllm_plugin.load.slot_ahead import SlotAhead, Withdrawn

MODULES = {name: name.upper() for name in "abc"}


def test_a_slot_is_ready_once_every_part_is_written() -> None:
    slot = SlotAhead(2, torch.device("cpu"))
    seen: list[tuple[str, Any, bool]] = []

    def do(modules: Any) -> None:
        for name, module in modules.items():
            seen.append((name, module, slot._is_written))

    slot.write(do, MODULES, None)
    assert seen == [("a", "A", False), ("b", "B", False), ("c", "C", False)]
    assert (slot.index, slot.is_ready) == (2, True)


def test_after_the_slot_was_withdrawn_no_part_is_written() -> None:
    slot = SlotAhead(0, torch.device("cpu"))
    is_in_first, written = threading.Event(), []

    def withdraw() -> None:
        is_in_first.wait(10)
        slot.withdraw()

    withdrawing = threading.Thread(target=withdraw)
    withdrawing.start()

    def do(modules: Any) -> None:
        parts = modules.items()
        written.append(next(parts)[0])
        is_in_first.set()
        withdrawing.join(0.2)
        assert withdrawing.is_alive()  # it waits for the part that is being written
        parts.close()  # which ends that part
        withdrawing.join(10)
        written.extend(name for name, _ in modules.items())

    with pytest.raises(Withdrawn):
        slot.write(do, MODULES, None)
    assert written == ["a"]
    assert not slot.is_ready


def test_a_slot_is_not_ready_if_it_was_withdrawn_later_or_writing_failed() -> None:
    slot = SlotAhead(0, torch.device("cpu"))
    slot.write(lambda modules: list(modules.items()), MODULES, None)
    slot.withdraw()
    failed = SlotAhead(0, torch.device("cpu"))

    def fail(modules: Any) -> None:
        for _ in modules.items():
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failed.write(fail, MODULES, None)
    assert (slot.is_ready, failed.is_ready) == (False, False)
    failed.withdraw()  # the lock is free again


def test_what_inference_mode_has_made_can_be_written() -> None:
    with torch.inference_mode():
        stack = torch.zeros(3)
    slot = SlotAhead(1, torch.device("cpu"))
    slot.write(lambda modules: [stack[1].fill_(5) for _ in modules.items()], {"a": 1}, None)
    assert stack.tolist() == [0.0, 5.0, 0.0]
