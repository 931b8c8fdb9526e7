"""All tensor-parallel workers of an engine load an adapter, or none does.

In: a load, and the group of the workers that must agree. Out: the load's result, or an error on
every rank; and which adapters all of them have. Without this, one damaged file would leave the
adapter loaded on the other ranks, and a second request for the same id would find it there: old
bytes on some ranks, new ones on one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNLESS = 2**63 - 1  # as much of a number as an int64 holds beside the -1 that fills up


def load_together(
    load: Callable[[], T], group: Any | None, version: Callable[[], bytes] = bytes
) -> T:
    """The result of `load` if it succeeds on every rank of the group; otherwise raise on each.

    group: a torch process group on the CPU, whose ranks must all call this at the same time; None
    for a worker on its own. version: called after `load`, a digest of what this rank has loaded.
    Raises the error of this rank's own `load`, or ValueError with the message of another's, or if
    the ranks have loaded different versions.
    """
    error: Exception | None = None
    result: T | None = None
    loaded = 0
    try:
        try:
            result = load()
            loaded = int.from_bytes(version()[:8], "big") >> 1  # so that its negative fits as well
        except Exception as err:  # noqa: BLE001 - raised again below, once the others know
            error = err
        failure = "" if error is None else f"{type(error).__name__}: {error}"
        failures = () if group is None else _failures_of_all(failure, loaded, group)
        if error is not None:
            raise error
    finally:
        # An error and the frame that it passed through hold each other, and with them all that the
        # load has read. Without the cycle its memory is free as soon as the error is handled.
        del error
    if failed := next(filter(None, failures), None):
        raise ValueError(f"Another rank could not load the adapter: {failed}")
    assert result is not None
    return result


def _failures_of_all(failure: str, loaded: int, group: Any) -> tuple[str | None, ...]:
    """What went wrong on each rank of the group, "" for nothing; () if all is well everywhere.

    One small all-reduce if all is well. Raises ValueError on every rank if all have loaded
    something, but not the same.
    """
    import torch
    import torch.distributed as dist

    # The largest of the negatives is the smallest, negated: so both with one operation.
    largest = torch.tensor([int(bool(failure)), loaded, -loaded], dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    any_failed, highest, lowest = largest.tolist()
    if not any_failed:
        if highest != -lowest:
            raise ValueError(
                "The ranks have read different versions of the adapter. Was the directory replaced "
                "while it was being loaded, or do hosts have different copies of it? Load it again "
                "once every host has the same copy."
            )
        return ()
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    return tuple(failures)


def held_by_all(numbers: Collection[int], group: Any) -> frozenset[int]:
    """Those of the numbers, each at least 0, that every rank of the group names.

    All ranks must call this at the same time. What is exchanged has one size on all of them.
    """
    import torch
    import torch.distributed as dist

    own = [number & _SIGNLESS for number in numbers]
    most = torch.tensor([max(1, len(own))], dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    filled = torch.tensor(own + [-1] * (int(most) - len(own)), dtype=torch.int64)
    of_each = [torch.empty_like(filled) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_each, filled, group=group)
    common = set(own).intersection(*(of_one.tolist() for of_one in of_each))
    return frozenset(number for number in numbers if number & _SIGNLESS in common)


def tensor_parallel_group() -> Any | None:
    """The tensor-parallel group of this worker on the CPU; None if it is alone in it.

    Not the pipeline-parallel one: a stage may load an adapter in the middle of a step, while the
    next stage waits for its output, so that each would wait for the other.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return None
    from vllm.distributed import parallel_state

    try:
        group = parallel_state.get_tp_group()
    except AssertionError:  # not initialised
        return None
    return group.cpu_group if group.world_size > 1 else None
