"""Which requests of an engine use which adapter, and which adapters wait to be removed.

In: the requests that come and end, and the adapters that are to go. Out: the removal of an adapter
once no request uses it. Before that, a request's next step would load the adapter again from its
path, where another version may lie by then, or nothing; and an error in a step ends the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lorashard.vllm_plugin.engine.prefix_versions import MAX_NAMES, PrefixVersions

logger = logging.getLogger("vllm.lorashard")


class AdapterUses:
    """The adapters of one engine, by vLLM's numbers for them.

    requests: the scheduler's, by id, which it keeps up to date. prefixes: gets the names of adapters
    that are replaced.
    """

    def __init__(self, requests: Mapping[str, Any], prefixes: PrefixVersions) -> None:
        self._requests = requests
        self._prefixes = prefixes
        self._take_out: Callable[[int], Any] = _nothing_to_take_out
        self._names: dict[int, str] = {}
        self._leaving: dict[int, set[str]] = {}  # an adapter, and the requests that it waits for

    def remove(self, number: int, take_out: Callable[[int], Any]) -> Any:
        """Remove the adapter now, or as soon as no request uses it. False if it was not there.

        take_out: takes an adapter out of all workers before they take another step, and answers with
        whether it was there, or with a future of that, which is the answer then.
        """
        self._take_out = take_out
        self._renew_prefixes(number)
        if users := self._users(number):
            self._leaving[number] = users
            logger.info(
                "lorashard: adapter %d is unloaded once its %d requests have ended",
                number, len(users),
            )  # fmt: skip
            return True
        self._leaving.pop(number, None)
        return self._take_out(number)

    def before_load(self, lora_request: Any) -> None:
        """An adapter is about to be loaded, by vLLM's LoRARequest: one that is leaving goes now."""
        number = int(lora_request.lora_int_id)
        in_place = bool(getattr(lora_request, "load_inplace", False))
        if self._leaving.pop(number, None) is not None and not in_place:
            self._take_out_unasked(number)
        if in_place:
            self._renew_prefixes(number)

    def request_came(self, request: Any) -> None:
        """A request has come to the scheduler.

        If it names an adapter that is leaving, it gets what its path holds now. If that is nothing,
        it was accepted before the adapter was unloaded, and still gets that one.
        """
        if request.lora_request is None:
            return
        number = int(request.lora_request.lora_int_id)
        if len(self._names) >= MAX_NAMES and number not in self._names:
            self._names.clear()
            self._prefixes.renew_all()
        self._names[number] = request.lora_request.lora_name
        if number in self._leaving:
            self._leaving[number].add(request.request_id)
            if Path(request.lora_request.lora_path).expanduser().exists():
                self._take_out_unasked(number)

    def request_ended(self, request: Any) -> None:
        """A request has left the scheduler. Never raises: the engine's step goes on."""
        if not self._leaving or request.lora_request is None:
            return
        number = int(request.lora_request.lora_int_id)
        waits_for = self._leaving.get(number)
        if waits_for is None:
            return
        waits_for.discard(request.request_id)
        if not waits_for:
            self._remove_unused(number)

    def _remove_unused(self, number: int) -> None:
        if users := self._users(number):
            self._leaving[number] = users
            return
        del self._leaving[number]
        try:
            self._take_out_unasked(number)
        except Exception as err:  # noqa: BLE001 - see `request_ended`
            _log_failure(number, err)

    def _take_out_unasked(self, number: int) -> None:
        taken_out = self._take_out(number)
        if isinstance(taken_out, Future):
            taken_out.add_done_callback(lambda done: _log_failure(number, done.exception()))

    def _users(self, number: int) -> set[str]:
        """The requests that use an adapter and have not ended."""
        return {
            request.request_id
            for request in self._requests.values()
            if request.lora_request is not None
            and request.lora_request.lora_int_id == number
            and not request.is_finished()
        }

    def _renew_prefixes(self, number: int) -> None:
        name = self._names.pop(number, None)
        if name is not None:  # otherwise no request has left anything in the cache
            self._prefixes.renew(name)


def _log_failure(number: int, error: BaseException | None) -> None:
    if error is not None:
        logger.error("lorashard: adapter %d could not be unloaded", number, exc_info=error)


def _nothing_to_take_out(_: int) -> bool:
    """Until the first removal nothing can be leaving."""
    return False
