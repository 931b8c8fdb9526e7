"""An adapter that came about without the loader: its experts are packed before vLLM packs them.

Whoever makes a LoRAModel, it reaches the layers through `LoRAModelManager._add_adapter`, which takes
the experts [ep_rank * n, (ep_rank + 1) * n) from it, and refuses fused factors where layers are 2D.
Here they are taken by the layers' expert maps before, from every layout, and vLLM leaves them alone.

Where somebody else than vLLM calls it, the ranks agree here: on every adapter, whatever a rank has
of it, and never on the warm-up's dummies, so that of ranks that call it all come to the exchange.
What raises here on one of them, it says to the others. For one whose caller has failed before this
call they wait some seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lorashard.errors import LorashardError
from lorashard.vllm_plugin.load.agreement import (
    Exchange,
    Outcome,
    describe,
    do_together,
    has_failed,
)
from lorashard.vllm_plugin.load.bounded_exchange import Meetings
from lorashard.vllm_plugin.load.lora_model import is_dummy
from lorashard.vllm_plugin.patches.adapter_loading import agreeing_group, attached_loader
from lorashard.vllm_plugin.patches.expert_rows import attached_rows
from lorashard.vllm_plugin.patches.explanations import for_a_server
from lorashard.vllm_plugin.patches.foreign import refuse_displaced

logger = logging.getLogger("vllm.lorashard")


def wrap_add_adapter_to_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager._add_adapter: experts that are not packed yet are packed first."""

    def _add_adapter(self: Any, lora: Any) -> Any:
        add = partial(_pack_and_add, original, self, lora)
        exchange = None
        try:
            exchange = _exchange_here(self, lora)
            return add() if exchange is None else do_together(add, exchange)
        except Exception as err:
            exchange = exchange or _exchange_here(self, lora)
            if exchange is None or not _settle(err, exchange, self, lora):
                raise
            return True

    return _add_adapter


def _exchange_here(manager: Any, lora: Any) -> Exchange | None:
    """Where the ranks agree on what is added; None if somebody else sees to that, or nobody needs to.

    Only by what all ranks have alike: never by which experts or tensors this one has.
    """
    loader = attached_loader(manager)
    if loader is None or loader.ep_size == 1 or is_dummy(lora):
        return None
    if loader.loading is not None:  # `WorkerLoRAManager.add_adapter` agrees at its end
        return None
    group = agreeing_group(manager)
    if group is None:
        return Exchange(None)
    if loader.meetings is None:
        loader.meetings = Meetings.of(group)
    return loader.meetings.about(f"adapter {lora.id}")


def _settle(error: Exception, exchange: Exchange, manager: Any, lora: Any) -> bool:
    """After an error: end it on all ranks alike. Whether all have the adapter in spite of it."""
    exchange.say(Outcome(describe(error)))
    if has_failed(exchange.hear()):
        with suppress(Exception):
            manager.remove_adapter(lora.id)
        return False
    logger.warning("lorashard: an adapter was added on all ranks, in spite of %r", error)
    return True


def _pack_and_add(original: Callable[..., Any], manager: Any, lora: Any) -> Any:
    loader = attached_loader(manager)
    prepared = None if loader is None else loader.prepared
    if prepared is not None and prepared.is_packed(lora):
        manager._registered_adapters[lora.id] = lora  # noqa: SLF001 - vLLM gives no other way
        prepared.on_device.enter(lora)
        return None
    if loader is not None and loader.ep_size > 1:
        refuse_displaced()  # by a package that came after the start
        try:
            loader.pack_experts(lora)
        except LorashardError as err:
            raise ValueError(f"LoRA adapter {lora.id}: {for_a_server(err)}") from err
        rows = attached_rows(manager)
        if rows is not None:
            rows.note_packed(lora)
        if not lora.loras:
            # Tensors of this rank's experts alone, and none of them is trained. vLLM's packing wants
            # at least one module; without any, activating the adapter clears its slot.
            logger.warning(
                "lorashard: adapter %d: no tensors were given on ep rank %d",
                lora.id,
                loader.ep_rank,
            )
            manager._registered_adapters[lora.id] = lora  # noqa: SLF001 - vLLM gives no other way
            return True
    added = original(manager, lora)
    # vLLM pins what it packs, and can do so with host memory only.
    if prepared is not None:
        prepared.on_device.enter(lora)
    return added
