"""One engine of several that share experts: all have the same adapters in the same slots, step by step.

With data parallelism, tokens travel to other engines' experts with the number of a LoRA slot. So in
the exchange that all engines have before each step anyway (`data_parallel`), each says which adapters
its own tokens want. All of them then write the union into the slots that `agreed_slots` gives out, each
from its own host memory. Only a step in which some slot changes takes two small exchanges more: what
every engine has of these adapters, and, before anybody computes, whether it has worked everywhere. An
engine that lacks one loads it in between (`held_adapters`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lorashard.rules import RANKS_DIFFER, REPLACED_WHILE_READ, with_rule
from lorashard.vllm_plugin.engine.agreed_slots import (
    Adapter,
    Announcement,
    Placement,
    SlotTable,
    union_of,
)
from lorashard.vllm_plugin.load.agreement import describe
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader
from lorashard.vllm_plugin.patches.held_adapters import HeldAdapters
from lorashard.vllm_plugin.patches.lora_metadata import write_metadata

logger = logging.getLogger("vllm.lorashard")

_AGREEMENT = "_lorashard_slot_agreement"  # an attribute of vLLM's LoRA managers

_TAKEN = -1  # no adapter's number

# What one engine says to all, and hears from all, by data-parallel rank.
Gather = Callable[[Any], Sequence[Any]]


class SlotAgreement:
    """Of one engine. dp_rank: its own. gather: an exchange with the others."""

    def __init__(self, worker_manager: Any, dp_rank: int, dp_size: int, gather: Gather) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.is_serving = False  # not during vLLM's warm-up, whose adapters are dummies
        self._worker_manager = worker_manager
        self._manager = worker_manager._adapter_manager  # noqa: SLF001
        self._gather = gather
        self.table = SlotTable.empty(self.num_slots)
        self.union: tuple[Adapter, ...] = ()
        self.held = HeldAdapters(worker_manager)
        self._written: dict[int, Any] = {}  # by slot, weakly
        self._wanted: tuple[Adapter, ...] = ()
        self._error = ""
        self._to_remove: set[int] = set()
        self._is_writing = False
        self._heard: Sequence[Announcement] | None = None  # what was agreed on last
        self._mapping: Any = None
        self.is_idle = False  # V2: in this step
        self.writes_later = False  # V2: once the slots are agreed on

    @property
    def num_slots(self) -> int:
        """--max-loras."""
        return int(self._manager.lora_slots)

    @property
    def num_active(self) -> int:
        """How many kinds of tokens there are, for CUDA graphs: adapters, and tokens without; 0 without any."""
        return len(self.union) + 1 if self.union else 0

    @property
    def gives_slots(self) -> bool:
        """Whether an adapter may be put into a slot now."""
        return self._is_writing or not self.is_serving

    def remove(self, number: int) -> bool:
        """Whether the removal of an adapter has to wait: until all engines are to remove it."""
        if not self.is_serving or number not in {a.number for a in self.table.adapters if a}:
            return False
        self._to_remove.add(number)
        return True

    def before_adding(self, request: Any) -> None:
        """An adapter is to be added on this engine: what is still to be removed under its number goes.

        Raises ValueError if the number is that of an adapter with another name.
        """
        number = int(request.lora_int_id)
        if number in self._to_remove:
            self._to_remove.discard(number)
            self._manager.remove_adapter(number)
        if clash := self.held.name_clash(request):
            raise ValueError(f"lorashard: {clash}")

    def want(self, requests: Iterable[Any]) -> None:
        """The adapters of this engine's tokens in the next step. Never raises."""
        self._error = ""
        wanted = {Adapter.of(int(r.lora_int_id), str(r.lora_name)): r for r in requests if r}
        for request in wanted.values():
            self._error = self._error or self.held.name_clash(request)
            self.held.note_used(request)
        if len(wanted) > self.num_slots:
            self._error = (
                f"a step uses {len(wanted)} adapters, and there are {self.num_slots} slots"
            )
        self._wanted = () if self._error else tuple(sorted(wanted))

    def announcement(self) -> Announcement:
        """What this engine has to say; what it wants is said once."""
        wanted, self._wanted = self._wanted, ()
        if not self.is_serving:
            return Announcement()
        removed = [
            slot for slot, a in enumerate(self.table.adapters) if a and a.number in self._to_remove
        ]
        return Announcement(wanted, frozenset(self._lost()), frozenset(removed), bool(self._error))

    def agree(self, announcements: Sequence[Announcement]) -> None:
        """Make the slots what all engines have agreed on. announcements: by rank.

        Raises the same error on every engine, before any of them computes.
        """
        if not self.is_serving:
            return
        failed = [rank for rank, said in enumerate(announcements) if said.has_failed]
        if failed:
            raise ValueError(
                f"lorashard: {self._error or f'data-parallel engine {failed[0]} cannot go on'}"
            )
        lost = frozenset[int]().union(*(said.lost for said in announcements))
        removed = frozenset.intersection(*(said.removed for said in announcements))
        table = self.table.without(lost | removed)
        self._vacate_all_but(table)
        try:
            union = union_of(announcements, table)
            self._remove_for_good({a.number for a in (*union, *table.adapters) if a is not None})
            table, placements = table.with_all(union)
        except ValueError as err:
            raise ValueError(f"lorashard: {err}") from err
        registered = self._manager._registered_adapters  # noqa: SLF001
        for adapter in union:  # so that none of them is evicted from host memory now
            if adapter.number in registered:
                registered.touch(adapter.number)
        if placements:
            self._place(placements, table, union)
        self.table, self.union = table, union

    def agree_once(self, heard: Callable[[], Sequence[Announcement]]) -> None:
        """The same for an exchange, however often it is asked for."""
        announcements = heard()
        if self._heard is not announcements:
            self._heard = announcements
            self.agree(announcements)

    def set_active(self, requests: Iterable[Any], mapping: Any) -> None:
        """A step's adapters and mapping, from the model runner."""
        if self.writes_later:
            self.writes_later = False
            self.write(mapping)
        else:
            self._mapping = mapping
            self.want(requests)

    def write_pending(self) -> None:
        """V1: the metadata of the mapping that was set before; an idle engine has none."""
        mapping, self._mapping = self._mapping, None
        self.write(mapping)

    def write(self, mapping: Any | None) -> None:
        """Tell vLLM's kernels of a step. mapping: a LoRAMapping of own tokens; None if there are none."""
        slots = [self.table.adapters.index(adapter) for adapter in self.union]
        write_metadata(self._manager, mapping, slots)

    def _lost(self) -> list[int]:
        there = self._manager.list_adapters()
        in_slots = self._manager.lora_index_to_id
        return [
            slot
            for slot, adapter in enumerate(self.table.adapters)
            if adapter is not None
            and (
                in_slots[slot] != adapter.number
                or there.get(adapter.number) is not self._written[slot]()
            )
        ]

    def _remove_for_good(self, in_use: Collection[int]) -> None:
        for number in self._to_remove.difference(in_use):
            self._manager.remove_adapter(number)
        self._to_remove.intersection_update(in_use)

    def _vacate_all_but(self, table: SlotTable) -> None:
        for slot, adapter in enumerate(table.adapters):
            if adapter is None:
                self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        number = self._manager.lora_index_to_id[slot]
        if number is not None:
            self._manager.deactivate_adapter(number)
            self._manager.lora_index_to_id[slot] = None

    def _place(
        self, placements: Sequence[Placement], table: SlotTable, union: Collection[Adapter]
    ) -> None:
        """Fill slots. Raises on every engine if one of them fails."""
        numbers = [placement.adapter.number for placement in placements]
        of_engines = self._gather({number: self.held.holding(number) for number in numbers})
        failure = ""
        try:
            for number in numbers:
                self.held.fetch(number, [of[number] for of in of_engines], self.dp_rank)
            self._is_writing = True
            for placement in placements:
                self._write_slot(placement)
            failure = self._difference(table, union)
        except Exception as err:
            logger.exception(
                "lorashard: cannot load an adapter that another engine uses, or this one"
            )
            failure = describe(err)
        finally:
            self._is_writing = False
        told = self._gather((failure, {number: self.held.version(number) for number in numbers}))
        _raise_failure(told)

    def _difference(self, table: SlotTable, union: Collection[Adapter]) -> str:
        """What is wrong after all. Slots that no engine uses in this step may have been lost on the way."""
        held = self._manager.lora_index_to_id
        wrong = [
            f"slot {slot} holds {held[slot]} and not {adapter.number}"
            for slot, adapter in enumerate(table.adapters)
            if adapter in union and adapter is not None and held[slot] != adapter.number
        ]
        return "; ".join(wrong)

    def _write_slot(self, placement: Placement) -> None:
        number = placement.adapter.number
        self._vacate(placement.slot)
        # vLLM takes the first free slot.
        slots = self._manager.lora_index_to_id
        others = [s for s, held in enumerate(slots) if held is None and s != placement.slot]
        for slot in others:
            slots[slot] = _TAKEN
        try:
            self._manager.activate_adapter(number)
        finally:
            for slot in others:
                slots[slot] = None
        self._written[placement.slot] = weakref.ref(self._manager.list_adapters()[number])


def _raise_failure(told: Sequence[tuple[str, Mapping[int, str]]]) -> None:
    for rank, (failure, _) in enumerate(told):
        if failure:
            refused = f"data-parallel engine {rank} could not load an adapter that is in use"
            raise ValueError(f"lorashard: {with_rule(refused, RANKS_DIFFER.id)}: {failure}")
    for number in told[0][1]:
        if len({versions[number] for _, versions in told}) > 1:
            different = (
                f"lorashard: the data-parallel engines have read different versions of adapter "
                f"{number}. Was the directory replaced meanwhile, or do hosts have different copies?"
            )
            raise ValueError(with_rule(different, REPLACED_WHILE_READ.id))


def attach_agreement(
    worker_manager: Any, dp_rank: int, dp_size: int, gather: Gather
) -> SlotAgreement:
    """Give a WorkerLoRAManager, and its LoRAModelManager, an agreement; it is this process's from now on."""
    agreement = SlotAgreement(worker_manager, dp_rank, dp_size, gather)
    for manager in (worker_manager, worker_manager._adapter_manager):  # noqa: SLF001
        setattr(manager, _AGREEMENT, agreement)
    loader = attached_loader(worker_manager)
    if loader is not None:
        loader.fills_slots_ahead = False  # an adapter gets its slot from all engines
    _of_process[:] = [weakref.ref(worker_manager)]
    return agreement


# vLLM's functions for data parallelism get no object of LoRA. A worker is a process with one engine.
_of_process: list[Any] = []


def current_agreement() -> SlotAgreement | None:
    """That of this process."""
    for reference in _of_process:
        worker_manager = reference()
        if worker_manager is not None:
            return attached_agreement(worker_manager)
    return None


def attached_agreement(manager: Any) -> SlotAgreement | None:
    """The agreement of a WorkerLoRAManager or a LoRAModelManager, if it has one."""
    agreement: SlotAgreement | None = getattr(manager, _AGREEMENT, None)
    return agreement
