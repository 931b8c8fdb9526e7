"""One engine of several that share experts: all have the same adapters in the same slots, step by step.

With data parallelism, tokens travel to other engines' experts with the number of a LoRA slot. So in
the exchange that all engines have before each step anyway (`data_parallel`), each says which adapters
its own tokens want. All of them then write the union into the slots that `agreed_slots` gives out, each
from its own host memory. Only a step in which some slot changes takes two small exchanges more: what
every engine has of these adapters, and, before anybody computes, whether it has worked everywhere. An
engine that lacks one loads it in between, from the path that another names.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.vllm_plugin.engine.agreed_slots import (
    MOST_NUMBER,
    Adapter,
    Announcement,
    Placement,
    SlotTable,
    union_of,
)
from lorashard.vllm_plugin.load.agreement import describe
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader
from lorashard.vllm_plugin.patches.lora_metadata import write_metadata

logger = logging.getLogger("vllm.lorashard")

_AGREEMENT = "_lorashard_slot_agreement"  # an attribute of vLLM's LoRA managers

_TAKEN = -1  # no adapter's number

# What one engine says to all, and hears from all, by data-parallel rank.
Gather = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Holding:
    """What an engine has of an adapter.

    generation: how often an adapter of that number had been added as this one was; the highest is the
    newest. version: of what is in host memory; None if nothing is. request: name and path of the last
    request for it; None if there was none.
    """

    generation: int = 0
    version: str | None = None
    request: tuple[str, str] | None = None


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
        self._requests: dict[int, Any] = {}
        self._num_added: dict[int, int] = {}
        self._generations: dict[int, int] = {}  # of what is in host memory
        self._versions: dict[int, str] = {}
        self._written: dict[int, Any] = {}  # by slot, weakly
        self._wanted: tuple[Adapter, ...] = ()
        self._error = ""
        self._to_remove: set[int] = set()
        self._is_fetching = self._is_writing = False
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

    def note_added(self, request: Any, *, was_loaded: bool) -> None:
        """An adapter has been added on this engine, into host memory."""
        number = int(request.lora_int_id)
        self._requests[number] = _plain(request)
        if was_loaded:
            loader = attached_loader(self._worker_manager)
            report = loader.last_report if loader is not None else None
            self._versions[number] = "" if report is None else report.compared
            if not self._is_fetching:
                self._num_added[number] = self._num_added.get(number, 0) + 1
                self._generations[number] = self._num_added[number]

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
        known = self._requests.get(number)
        there = number in self._worker_manager.list_adapters()
        if there and known is not None and known.lora_name != request.lora_name:
            raise ValueError(
                f"lorashard: {request.lora_name!r} has the number {number}, which is that of "
                f"{known.lora_name!r}. With data parallelism and several API servers, name all "
                "adapters with --lora-modules, or start one API server (--api-server-count 1)."
            )

    def want(self, requests: Iterable[Any]) -> None:
        """The adapters of this engine's tokens in the next step. Never raises."""
        self._error = ""
        wanted = {Adapter.of(int(r.lora_int_id), str(r.lora_name)): r for r in requests if r}
        for adapter, request in wanted.items():
            if adapter.number not in self._requests:
                self._requests[adapter.number] = _plain(request)
            if not 0 < adapter.number <= MOST_NUMBER:
                self._error = f"{adapter.number} is not a number that lorashard can send"
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
        held = self._gather({p.adapter.number: self._holding(p.adapter.number) for p in placements})
        failure = ""
        try:
            self._is_fetching = True
            for placement in placements:
                self._fetch(placement.adapter.number, [of[placement.adapter.number] for of in held])
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
            self._is_fetching = self._is_writing = False
        versions = {p.adapter.number: self._versions.get(p.adapter.number, "") for p in placements}
        told = self._gather((failure, versions))
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

    def _holding(self, number: int) -> Holding:
        request = self._requests.get(number)
        is_there = number in self._manager.list_adapters()
        return Holding(
            self._generations.get(number, 0),
            self._versions.get(number, "") if is_there else None,
            None if request is None else (request.lora_name, request.lora_path),
        )

    def _fetch(self, number: int, held: Sequence[Holding]) -> None:
        """Have an adapter in host memory, in the newest version. held: what each engine has of it."""
        newest = max(of.generation for of in held)
        of_newest = [of for of in held if of.generation == newest]
        versions = {of.version for of in of_newest if of.version is not None}
        own = held[self.dp_rank]
        if own.generation == newest and own.version is not None and len(versions) == 1:
            return
        name_and_path = next((of.request for of in of_newest if of.request is not None), None)
        if name_and_path is None:
            raise ValueError(
                f"adapter {number} is on another data-parallel engine, and it is not known from where"
            )
        request = self._request(number, *name_and_path)
        logger.info(
            "lorashard: adapter %s is loaded, as another data-parallel engine uses it", number
        )
        self._manager.remove_adapter(number)
        self._worker_manager.add_adapter(request)
        self._generations[number] = newest

    def _request(self, number: int, name: str, path: str) -> Any:
        known = self._requests.get(number)
        if known is not None and (known.lora_name, known.lora_path) == (name, path):
            return known
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)

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


def _plain(request: Any) -> Any:
    """A request without what is said of one load of it."""
    plain = copy.copy(request)
    plain.base_model_name = None
    if getattr(plain, "load_inplace", False):
        plain.load_inplace = False
    return plain


def _raise_failure(told: Sequence[tuple[str, Mapping[int, str]]]) -> None:
    for rank, (failure, _) in enumerate(told):
        if failure:
            raise ValueError(
                f"lorashard: data-parallel engine {rank} could not load an adapter that is in use: "
                f"{failure}"
            )
    for number in told[0][1]:
        if len({versions[number] for _, versions in told}) > 1:
            raise ValueError(
                f"lorashard: the data-parallel engines have read different versions of adapter "
                f"{number}. Was the directory replaced meanwhile, or do hosts have different copies?"
            )


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


def gather_over(group: Callable[[], Any]) -> Gather:
    """An exchange of any values over a process group on the CPU, which is asked for as late as it is needed."""

    def gather(own: Any) -> Collection[Any]:
        import torch.distributed as dist

        heard: list[Any] = [None] * dist.get_world_size(group())
        dist.all_gather_object(heard, own, group())
        return heard

    return gather  # type: ignore[return-value]
