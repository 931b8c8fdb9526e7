"""All tensor-parallel workers of an engine load an adapter, or none does.

If one rank's file is damaged and the others' are not, the others would keep the adapter, and a
second try under the same id would find it there: some ranks with the old bytes, one with the new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def load_together(load: Callable[[], T], groups: list[Any]) -> T:
    """What `load` returns, if it succeeds on every rank of every group; else raise everywhere.

    groups: torch process groups on the CPU; every rank of each must call this at the same time.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = load()
    except Exception as err:  # noqa: BLE001 - raised again below, once the others know
        error = err
    others = _failures_elsewhere(error, groups)
    if error is not None:
        raise error
    if others:
        raise ValueError(f"Another rank could not load the adapter: {others}")
    assert result is not None
    return result


def _failures_elsewhere(error: Exception | None, groups: list[Any]) -> str:
    """The first message of another rank, "" if there is none. One small all-reduce if all is well."""
    import torch
    import torch.distributed as dist

    message = "" if error is None else f"{type(error).__name__}: {error}"
    for group in groups:
        failed = torch.tensor([int(bool(message))], dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
        if failed.item():
            messages: list[str | None] = [None] * dist.get_world_size(group)
            dist.all_gather_object(messages, message, group=group)
            message = message or next(text for text in messages if text)
    return message if error is None else ""


def cpu_groups() -> list[Any]:
    """The tensor-parallel group of this worker, if it has others in it.

    Not the pipeline-parallel one: a stage may load an adapter in the middle of a step, while the
    next one waits for its output, and both would wait for each other.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return []
    from vllm.distributed import parallel_state

    try:
        group = parallel_state.get_tp_group()
    except AssertionError:  # not initialised
        return []
    return [group.cpu_group] if group.world_size > 1 else []
