"""An adapter that the workers add or remove between two steps, while the engine goes on scheduling.

vLLM's engine waits for what it has asked its workers: first for the steps that they were given before,
then for the answer; only then does it schedule the next step, and meanwhile they have none to take. Here
the answer is a future, which vLLM hands to the client once it is there. The workers get everything in
the same order as otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from lorashard.vllm_plugin.patches.apply import replacements
from lorashard.vllm_plugin.patches.foreign import is_of_vllm
from lorashard.vllm_plugin.patches.refused_adds import ask_workers, outcome_of

_ASKED = "_lorashard_asked"  # an attribute of vLLM's EngineCore: what the workers have not answered


def add_between_steps(engine: Any, lora_request: Any, add: Callable[..., Any]) -> Any:
    """Whether the workers have added the adapter, or a future of it. add: vLLM's own way, which waits.

    engine: an EngineCore. Raises what `add` raises.
    """
    executor = engine.model_executor
    # Another package may have a way of its own.
    if not (type(executor).add_lora in replacements.values() and _may_answer_later(engine)):
        return add(engine, lora_request)
    return _ask(engine, partial(ask_workers, executor, lora_request), outcome_of)


def remove_between_steps(engine: Any, number: int, remove: Callable[..., Any]) -> Any:
    """The same for removing an adapter, of vLLM's number for it."""
    executor = engine.model_executor
    # Another package may have a way of its own.
    if not (is_of_vllm(type(executor).remove_lora) and _may_answer_later(engine)):
        return bool(remove(engine, number))
    return _ask(engine, partial(executor.collective_rpc, "remove_lora", args=(number,)), all)


def _ask(
    engine: Any, ask: Callable[..., Any], outcome: Callable[[list[Any]], bool]
) -> Future[bool]:
    """A future of the outcome of what all workers answer. ask: them, without waiting."""
    # One at a time: the queues between engine and workers are short, and neither may wait for the other.
    _wait_for_answer(engine)
    asked = ask(non_block=True)
    setattr(engine, _ASKED, asked)
    # The answer is read on the way to that of the next step. Where there is none, the engine says so.
    callbacks = engine._idle_state_callbacks  # noqa: SLF001 - vLLM gives no other way
    if _wait_for_answer not in callbacks:
        callbacks.append(_wait_for_answer)
    answer: Future[bool] = Future()
    asked.add_done_callback(partial(_pass_on, answer, outcome))
    return answer


def _may_answer_later(engine: Any) -> bool:
    """Whether its client takes a future, it says when it is idle, and its executor reads in order."""
    return (
        hasattr(engine, "_invoke_utility_method")  # not if the client calls it in its own process
        and hasattr(engine, "_idle_state_callbacks")
        and hasattr(engine.model_executor, "futures_queue")
    )


def _wait_for_answer(engine: Any) -> None:
    asked = getattr(engine, _ASKED, None)
    setattr(engine, _ASKED, None)
    if asked is not None:
        with suppress(Exception):  # which the client is told of
            asked.result()


def _pass_on(
    answer: Future[bool], outcome: Callable[[list[Any]], bool], asked: Future[list[Any]]
) -> None:
    try:
        result = outcome(asked.result())
    except Exception as err:  # noqa: BLE001 - for the client
        answer.set_exception(err)
    else:
        answer.set_result(result)
