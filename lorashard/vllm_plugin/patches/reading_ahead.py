"""`/v1/load_lora_adapter`: the workers read the adapter before the engine is to add it.

vLLM's workers add an adapter between two steps, and until it is there no request goes on. So the
server first has the adapter read, and asks now and then how it goes; only then has it added. It asks
with an `add_lora` that bears a mark, since the workers of every release have that method. A worker
that does not know the mark adds the adapter right away.
"""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from lorashard.vllm_plugin.engine.facts import has_lora_and_ep
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.read_ahead import ReadAhead
from lorashard.vllm_plugin.load.report import LoadedAdapter
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead

# Before the number of the request, in place of a base model's name, which no worker looks at.
_TO_BE_READ, _WAS_READ = "lorashard: to be read: ", "lorashard: was read: "
_FIRST_DELAY_S, _LAST_DELAY_S = 0.005, 0.05
# At first it waits for most of the time that the adapter before took: a question takes time of a step.
_SHARE_OF_LAST, _LONGEST_GUESS_S = 0.75, 0.06
_LAST_READ_S = "_lorashard_last_read_s"  # an attribute of vLLM's AsyncLLM
_LIMIT_S = 600.0  # an adapter that is not read by then is waited for in the engine


def wrap_async_add_lora(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """AsyncLLM.add_lora: only once the workers have read the adapter."""

    async def add_lora(self: Any, lora_request: Any) -> Any:
        # A subclass may bring tensors.
        if not has_lora_and_ep(self.vllm_config) or type(lora_request).__name__ != "LoRARequest":
            return await original(self, lora_request)
        number, began = uuid.uuid4().hex, time.perf_counter()
        for delay in _delays(getattr(self, _LAST_READ_S, 0.0)):
            if await original(self, _marked(lora_request, _TO_BE_READ + number)):
                break
            await asyncio.sleep(delay)
        setattr(self, _LAST_READ_S, time.perf_counter() - began)
        return await original(self, _marked(lora_request, _WAS_READ + number))

    return add_lora


def _marked(request: Any, mark: str) -> Any:
    marked = copy.copy(request)
    marked.base_model_name = mark
    return marked


def _delays(last_read_s: float) -> Iterator[float]:
    first = max(_FIRST_DELAY_S, min(_SHARE_OF_LAST * last_read_s, _LONGEST_GUESS_S))
    yield first
    delay, total = _FIRST_DELAY_S, first
    while total < _LIMIT_S:
        yield delay
        total += delay
        delay = min(1.2 * delay, _LAST_DELAY_S)


def is_to_be_read(request: Any) -> bool:
    """Whether a request only asks for its adapter to be read. Never raises."""
    return str(getattr(request, "base_model_name", None)).startswith(_TO_BE_READ)


def read_ahead(
    loader: AdapterLoader,
    request: Any,
    read: Callable[[SlotAhead | None], LoadedAdapter],
    find_slot: Callable[[], SlotAhead | None],
) -> bool:
    """In a worker: begin to read, or look how it goes. Whether there is nothing to wait for.

    One adapter is read at a time, so that no more memory is needed than for a load as it is added.
    find_slot: asked as reading begins, for a free one, into which `read` may write the adapter.
    """
    number = _number(request, _TO_BE_READ)
    assert number is not None
    ahead = loader.ahead
    if ahead is not None and (ahead.number == number or not ahead.is_over):
        return ahead.is_over or ahead.number != number
    loader.ahead = None  # nobody has come for that one: its memory is free first
    slot = loader.slot_ahead = find_slot()
    loader.ahead = ReadAhead(number, partial(read, slot), loader.device)
    return False


def take_read(loader: AdapterLoader, request: Any) -> LoadedAdapter | None:
    """What was read for this request; None if it was not. Raises what reading it has raised."""
    ahead = loader.ahead
    if ahead is None or ahead.number != _number(request, _WAS_READ):
        return None
    try:
        return ahead.wait()
    finally:
        loader.ahead = None


def forget_read(loader: AdapterLoader, request: Any) -> None:
    """What was read for this request and not taken is not needed any more."""
    ahead = loader.ahead
    if ahead is not None and ahead.number == _number(request, _WAS_READ):
        loader.ahead = None
        if loader.slot_ahead is not None:
            loader.slot_ahead.withdraw()  # its thread may go on for a while


def _number(request: Any, mark: str) -> str | None:
    name = str(getattr(request, "base_model_name", None) or "")
    return name.removeprefix(mark) if name.startswith(mark) else None
