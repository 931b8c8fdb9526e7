"""An adapter that workers cannot add: each of them answers, and the next call gets answers of its own.

vLLM's executor reads the answers to a call rank by rank, and stops at the first failure. What the
ranks behind it have said stays in their queues, and is taken for the answer to the next call, and so
on for ever: after one adapter that was refused, loads that succeed are reported as failed. Under
expert parallelism all ranks refuse an adapter that one of them cannot load, so that would be each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.vllm_plugin.engine.facts import has_lora_and_ep

logger = logging.getLogger("vllm.lorashard")


@dataclass(frozen=True, slots=True)
class NotAdded:
    """A worker's answer in place of an error."""

    reason: str


def wrap_executor_add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """Executor.add_lora: under expert parallelism a failure is an answer as any other.

    `Worker.add_lora` itself still raises, since RL frameworks call it in the worker.
    """

    def add_lora(self: Any, lora_request: Any) -> Any:
        if not has_lora_and_ep(self.vllm_config):
            return original(self, lora_request)
        return outcome_of(ask_workers(self, lora_request))

    return add_lora


def ask_workers(executor: Any, lora_request: Any, **how: Any) -> Any:
    """The answers of all workers. how: for vLLM's `collective_rpc`; a future of them with non_block."""
    return executor.collective_rpc(add_or_say_why, args=(lora_request,), **how)


def outcome_of(answers: Sequence[Any]) -> bool:
    """Whether all workers have added the adapter. Raises RuntimeError if one could not."""
    reasons = [answer.reason for answer in answers if isinstance(answer, NotAdded)]
    if reasons:
        raise RuntimeError(f"Worker failed with error '{reasons[0]}'")
    return all(answers)


def add_or_say_why(worker: Any, lora_request: Any) -> Any:
    """In the worker: what its `add_lora` returns, or why it has raised."""
    try:
        return worker.add_lora(lora_request)
    except ValueError as err:  # explained, by the loader or by vLLM
        logger.error("lorashard: %s", err)  # noqa: TRY400 - a trace would hide it
        return NotAdded(str(err))
    except Exception as err:
        logger.exception("lorashard: an adapter was not added")
        return NotAdded(f"{type(err).__name__}: {err}")
