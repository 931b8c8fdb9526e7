"""Adding an adapter: on every rank, or on none.

vLLM loads it, evicts another, merges, registers and activates the new one, and each of these can
fail on one rank alone, for example where the GPU is full. That rank would load the adapter at its
next use, and wait for the others, which have it already; or they would load what they have evicted,
and wait for the rank that has not.

The ranks agree twice: when they have loaded, before anything changes, and at the end. A rank that
has left the way says so in place of whatever the others come to next, and there the way ends for
them as well. So nobody waits for a rank that does not come. All of them begin, since they get the
same requests in the same order, and by this have the same adapters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lorashard.vllm_plugin.load.agreement import (
    Exchange,
    Outcome,
    describe,
    has_failed,
    held_by_all,
    raise_failure,
)
from lorashard.vllm_plugin.patches.adapter_loading import (
    agreeing_group,
    attached_loader,
    read_before_adding,
)
from lorashard.vllm_plugin.patches.load_report import report_adding
from lorashard.vllm_plugin.patches.reading_ahead import forget_read, is_to_be_read
from lorashard.vllm_plugin.patches.slot_agreement import attached_agreement

logger = logging.getLogger("vllm.lorashard")


def wrap_add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.add_adapter: if it fails on one rank while a load is due, no rank keeps the adapter.

    What is there already is activated without asking anybody. A request that only has an adapter
    read adds nothing.
    """

    def add_adapter(self: Any, adapter_request: Any) -> Any:
        adding = _Adding(self, adapter_request)
        if is_to_be_read(adapter_request):
            return not adding.is_load_due() or read_before_adding(self, adapter_request)
        try:
            agreement = attached_agreement(self)
            if agreement is not None:
                agreement.before_adding(adapter_request)
            was_due = adding.is_load_due()
            adding.begin()
            added = original(self, adapter_request)
            adding.agree()
            if agreement is not None:
                agreement.held.note_added(adapter_request, was_loaded=was_due)
        except Exception as err:
            if not adding.settle(err):
                raise
            added = True
        finally:
            adding.leave()
        return added

    return add_adapter


@dataclass(slots=True)
class _Adding:
    """One call of add_adapter on this rank. exchanges: for when it has loaded, and for the end.

    began: the time of `perf_counter`.
    """

    worker_manager: Any
    request: Any
    exchanges: tuple[Exchange, Exchange] | None = None
    has_begun: bool = False
    began: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Prepare to agree, if a load is due: then it is on all ranks."""
        loader = attached_loader(self.worker_manager)
        if loader is not None and self.is_load_due():
            group = agreeing_group(self.worker_manager)
            if group is not None:
                most = loader.most_adapters
                self.exchanges = Exchange(group, most), Exchange(group, most)
                loader.loading = self.exchanges[0]
        self.has_begun = True

    def agree(self) -> None:
        """After adding: agree with the others. Raises if one of them has failed."""
        if self.exchanges is not None:
            self.exchanges[1].say(Outcome(held=self._held(), is_adding=True))
            raise_failure(self.exchanges[1].hear())
            self._end()
            report_adding(
                self.request.lora_name,
                self.request.lora_int_id,
                time.perf_counter() - self.began,
                [exchange.waited_s for exchange in self.exchanges],
            )

    def settle(self, error: Exception) -> bool:
        """After an error: end it on all ranks alike. Whether all have the adapter in spite of it."""
        if not self.has_begun:
            self.begin()
        if self.exchanges is None:
            return False
        outcomes = self._heard_after(describe(error))
        self._end()
        if not any(outcome.failure for outcome in outcomes) and self.exchanges[1].has_said:
            logger.warning("lorashard: an adapter was added on all ranks, in spite of %r", error)
            return True
        if any(outcome.is_adding for outcome in outcomes):
            self._take_out(held_by_all(outcomes))
        return False

    def _heard_after(self, failure: str) -> tuple[Outcome, ...]:
        """What the ranks said where the way of one of them has ended."""
        assert self.exchanges is not None
        loading, end = self.exchanges
        if loading.has_said and not end.has_said:
            outcomes = loading.hear()
            if has_failed(outcomes):
                return outcomes
        last = end if loading.has_said or end.has_said else loading
        last.say(Outcome(failure, held=self._held(), is_adding=last is end))
        return last.hear()

    def _end(self) -> None:
        loader = attached_loader(self.worker_manager)
        assert loader is not None
        loader.loading = None

    def leave(self) -> None:
        """Free what was read ahead, and the device's memory beside the slots. Never raises."""
        loader = attached_loader(self.worker_manager)
        if loader is None:
            return
        forget_read(loader, self.request)
        if loader.prepared is not None:
            loader.prepared.on_device.leave()
            loader.prepared = loader.slot_ahead = None

    def is_load_due(self) -> bool:
        """Whether the adapter is not there yet, or is to be replaced."""
        is_new = self.request.lora_int_id not in self.worker_manager.list_adapters()
        return is_new or bool(getattr(self.request, "load_inplace", False))

    def _held(self) -> tuple[int, ...]:
        held: tuple[int, ...] = ()
        with suppress(Exception):
            held = tuple(self.worker_manager.list_adapters())
        return held

    def _take_out(self, common: frozenset[int]) -> None:
        """Remove the adapter, which may be half there, and what another rank has evicted already."""
        for number in {*self._held(), self.request.lora_int_id}:
            if number == self.request.lora_int_id or number not in common:
                with suppress(Exception):
                    self.worker_manager.remove_adapter(number)
        with suppress(Exception):
            _free_lost_slots(self.worker_manager._adapter_manager)  # noqa: SLF001


def _free_lost_slots(manager: Any) -> None:
    """Free the slots of adapters that are not there any more, or that are only half in theirs.

    An error in the middle of an eviction leaves them behind in vLLM's LoRAModelManager.
    """
    slots, active = manager.lora_index_to_id, manager._active_adapters  # noqa: SLF001
    whole = set(active).intersection(slots, manager.list_adapters())
    for number in set(active) - whole:
        active.pop(number, None)
    for index, number in enumerate(slots):
        if number not in whole:
            slots[index] = None
