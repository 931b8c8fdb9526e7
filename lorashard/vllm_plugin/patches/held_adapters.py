"""The adapters that one data-parallel engine has in host memory, and how it gets one that another has.

An engine is told of adapters in its own time. So each counts how often one of a number was added: what
the highest count belongs to is the newest, and an engine that has less loads that, from the path that
the other was given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.vllm_plugin.engine.agreed_slots import MOST_NUMBER
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader

logger = logging.getLogger("vllm.lorashard")


@dataclass(frozen=True, slots=True)
class Source:
    """From where an adapter can be loaded: fields of its LoRARequest, without tensors that it may bring."""

    name: str
    path: str
    is_3d: bool

    @staticmethod
    def of(request: Any) -> Source:
        """What the request says."""
        is_3d = bool(getattr(request, "is_3d_lora_weight", False))
        return Source(str(request.lora_name), str(request.lora_path), is_3d)

    def request(self, number: int) -> Any:
        """A LoRARequest of vLLM's."""
        from vllm.lora.request import LoRARequest

        options = {"is_3d_lora_weight": True} if self.is_3d else {}
        return LoRARequest(lora_name=self.name, lora_int_id=number, lora_path=self.path, **options)


@dataclass(frozen=True, slots=True)
class Holding:
    """What an engine has of an adapter.

    generation: how often an adapter of that number had been added as this one was; the highest is the
    newest. version: of what is in host memory; None if nothing is. source: of the last request for
    it; None if there was none.
    """

    generation: int = 0
    version: str | None = None
    source: Source | None = None


class HeldAdapters:
    """Of one engine, by number. worker_manager: vLLM's WorkerLoRAManager."""

    def __init__(self, worker_manager: Any) -> None:
        self._worker_manager = worker_manager
        self._manager = worker_manager._adapter_manager  # noqa: SLF001
        self._sources: dict[int, Source] = {}
        self._num_added: dict[int, int] = {}
        self._generations: dict[int, int] = {}  # of what is in host memory
        self._versions: dict[int, str] = {}
        self._is_fetching = False

    def name_clash(self, request: Any) -> str:
        """What is wrong if the request's number is that of an adapter with another name; "" if it is not."""
        number, name = int(request.lora_int_id), str(request.lora_name)
        if not 0 < number <= MOST_NUMBER:
            return f"{number} is not a number that lorashard can send"
        known = self._sources.get(number)
        if known is None or known.name == name or number not in self._manager.list_adapters():
            return ""
        return (
            f"{name!r} has the number {number}, which is that of {known.name!r}. With data parallelism "
            "and several API servers, name all adapters with --lora-modules, or start one API server "
            "(--api-server-count 1)."
        )

    def note_used(self, request: Any) -> None:
        """A request names an adapter, which may never have been added."""
        number = int(request.lora_int_id)
        known = self._sources.get(number)
        if known is None or known.name != str(request.lora_name):
            self._sources[number] = Source.of(request)

    def note_added(self, request: Any, *, was_loaded: bool) -> None:
        """An adapter has been added on this engine."""
        number = int(request.lora_int_id)
        self._sources[number] = Source.of(request)
        if was_loaded:
            loader = attached_loader(self._worker_manager)
            report = loader.last_report if loader is not None else None
            self._versions[number] = "" if report is None else report.compared
            if not self._is_fetching:
                self._num_added[number] = self._num_added.get(number, 0) + 1
                self._generations[number] = self._num_added[number]

    def version(self, number: int) -> str:
        """Of what was loaded last; "" if it has none."""
        return self._versions.get(number, "")

    def holding(self, number: int) -> Holding:
        """What this engine has of an adapter."""
        is_there = number in self._manager.list_adapters()
        return Holding(
            self._generations.get(number, 0),
            self.version(number) if is_there else None,
            self._sources.get(number),
        )

    def fetch(self, number: int, held: Sequence[Holding], engine: int) -> None:
        """Have the newest version of an adapter. held: what each engine has. engine: this one.

        Raises ValueError, or what loading it raises.
        """
        newest = max(of.generation for of in held)
        of_newest = [of for of in held if of.generation == newest]
        versions = {of.version for of in of_newest if of.version is not None}
        own = held[engine]
        if own.generation == newest and own.version is not None and len(versions) == 1:
            return
        source = next((of.source for of in of_newest if of.source is not None), None)
        if source is None:
            raise ValueError(
                f"adapter {number} is on another data-parallel engine, and it is not known from where"
            )
        logger.info("lorashard: adapter %s is loaded, as another engine has it", number)
        self._manager.remove_adapter(number)
        self._is_fetching = True
        try:
            self._worker_manager.add_adapter(source.request(number))
        finally:
            self._is_fetching = False
        self._generations[number] = newest
