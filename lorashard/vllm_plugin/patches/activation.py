"""Activating an adapter: it gets a slot on the device, or is in one already.

`adding_ahead` has written it there. All ranks have agreed that they have it in the same slot, since
EPLB moves the rows of a slot between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.prepared import NO_SLOT
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader
from lorashard.vllm_plugin.patches.expert_rows import attached_rows

logger = logging.getLogger("vllm.lorashard")


def wrap_activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager.activate_adapter: an adapter that is in a slot already is not written again.

    With EPLB, what is written goes to where the experts are now.
    """

    def activate_adapter(self: Any, lora_id: int) -> Any:
        rows = attached_rows(self)
        with nullcontext() if rows is None else rows.lock:
            is_new = _activate(original, self, lora_id)
            if is_new and rows is not None:
                rows.activated(lora_id)
        return is_new

    return activate_adapter


def wrap_sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    """Worker.sleep: an adapter that is being written into a slot is not, once the slot's memory is gone."""

    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        loader = attached_loader(getattr(self.model_runner, "lora_manager", None))
        if loader is not None and loader.slot_ahead is not None:
            loader.slot_ahead.withdraw()
            if loader.device.type == "cuda":
                import torch

                torch.cuda.synchronize(loader.device)
        return original(self, *args, **kwargs)

    return sleep


def _activate(original: Callable[..., Any], manager: Any, number: int) -> Any:
    loader = attached_loader(manager)
    active, slots = manager._active_adapters, manager.lora_index_to_id  # noqa: SLF001
    if loader is None or number in active:
        return original(manager, number)
    prepared = loader.prepared
    index = NO_SLOT if prepared is None else prepared.slot_of(manager.get_adapter(number))
    if index == NO_SLOT or slots[index] is not None:
        _make_way(loader, slots)
        return original(manager, number)
    active[number] = None
    slots[index] = number
    logger.debug("lorashard: adapter %d is in slot %d already", number, index)
    return True


def _make_way(loader: AdapterLoader, slots: list[int | None]) -> None:
    """VLLM takes the first free slot: no other adapter is written into it from now on."""
    ahead = loader.slot_ahead
    if ahead is not None and None in slots and ahead.index == slots.index(None):
        ahead.withdraw()
