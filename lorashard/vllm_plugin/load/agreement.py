"""All tensor-parallel workers of an engine load an adapter, or none does.

In: what a worker does, and an `Exchange` with the workers that must agree. Out: the result, or an
error on every rank. Without this, one damaged file would leave the adapter loaded on the other
ranks, and a second request for the same id would find it there: old bytes on some ranks, new ones
on one.

An exchange is a single all-gather. A rank has taken part in it, or has not; so whatever goes wrong
on a rank, and wherever, it knows whether the others wait for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import reduce
from typing import Any, TypeVar

from lorashard.rules import RANKS_DIFFER, REPLACED_WHILE_READ, with_rule

T = TypeVar("T")

_MOST_CHARACTERS = 2000  # of a failure
_FIXED_BYTES = 6 * _MOST_CHARACTERS + 200  # JSON has at most 6 for a character
_BYTES_A_NUMBER = 32  # of an adapter, which is an int64 nearly everywhere


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has to say.

    failure: "" if all is well. version: of what it has loaded; "" where there is none, or it does
    not matter. held: the numbers of the adapters that it has now. is_adding: it has changed what
    it has. slot: the one that the adapter is in already; -1 if it is in none.
    """

    failure: str = ""
    version: str = ""
    held: tuple[int, ...] = ()
    is_adding: bool = False
    slot: int = -1

    def encode(self) -> bytes:
        """As the other ranks get it."""
        return json.dumps(astuple(self)).encode()

    @staticmethod
    def decode(received: bytes) -> Outcome:
        """What a rank has said. Spaces may stand behind it."""
        failure, version, held, is_adding, slot = json.loads(received)
        return Outcome(failure, version, tuple(held), is_adding, slot)


class Exchange:
    """Each rank of a group says one thing, and hears what the others say.

    All ranks must come to it at about the same time. None for a worker on its own.
    """

    def __init__(self, group: Any | None, num_adapters: int = 0) -> None:
        """group: a torch process group on the CPU. num_adapters: at most in `Outcome.held`."""
        self._group = group
        self._size = _FIXED_BYTES + _BYTES_A_NUMBER * num_adapters
        self._sent: Any = None
        self._received: list[Any] = []
        self._work: Any = None
        self.waited_s = 0.0  # for the others

    @property
    def has_said(self) -> bool:
        """Whether this rank has taken part. Until then the others wait."""
        return self._work is not None

    def say(self, own: Outcome) -> None:
        """Take part. Only what is said first counts."""
        if self.has_said:
            return
        import torch.distributed as dist

        self._sent = _to_tensor(own.encode().ljust(self._size))
        if self._group is None:
            self._work = _Alone()
            self._received = [self._sent]
            return
        self._received = [self._sent.clone() for _ in range(dist.get_world_size(self._group))]
        self._work = dist.all_gather(self._received, self._sent, self._group, async_op=True)

    def hear(self) -> tuple[Outcome, ...]:
        """What each rank has said, this one too. Waits until all have."""
        began = time.perf_counter()
        self._work.wait()
        self.waited_s += time.perf_counter() - began
        return tuple(Outcome.decode(received.numpy().tobytes()) for received in self._received)


class _Alone:
    def wait(self) -> None:
        """There is nobody to wait for."""


def do_together(
    do: Callable[[], T],
    exchange: Exchange,
    version: Callable[[], str] = str,
    slot: Callable[[], int] = lambda: -1,
) -> T:
    """The result of `do` if it succeeds on every rank of the exchange; otherwise raise on each.

    version: called after `do`, the version of what this rank has loaded. slot: the same for
    `Outcome.slot`.
    Raises the error of this rank's own `do`, or ValueError with the message of another's, or if
    the ranks have loaded different versions.
    """
    try:
        result = do()
        exchange.say(Outcome(version=version(), slot=slot()))
    except Exception as err:
        exchange.say(Outcome(describe(err)))
        exchange.hear()
        raise
    raise_failure(exchange.hear())
    return result


def raise_failure(outcomes: Iterable[Outcome]) -> None:
    """Raise ValueError if any rank has failed, or the versions differ; the same on every rank."""
    outcomes = tuple(outcomes)
    for outcome in outcomes:
        if outcome.failure:
            refused = with_rule("Another rank could not load the adapter", RANKS_DIFFER.id)
            raise ValueError(f"{refused}: {outcome.failure}")
    if len({outcome.version for outcome in outcomes}) > 1:
        raise ValueError(
            with_rule(
                "The ranks have read different versions of the adapter. Was the directory replaced "
                "while it was being loaded, or do hosts have different copies of it? Load it again "
                "once every host has the same copy.",
                REPLACED_WHILE_READ.id,
            )
        )


def has_failed(outcomes: Iterable[Outcome]) -> bool:
    """Whether that would be raised."""
    try:
        raise_failure(outcomes)
    except ValueError:
        return True
    return False


def describe(error: Exception) -> str:
    """An error as the other ranks are told."""
    return f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS]


def held_by_all(outcomes: Iterable[Outcome]) -> frozenset[int]:
    """The numbers of the adapters that every rank has."""
    return reduce(frozenset.intersection, (frozenset(outcome.held) for outcome in outcomes))


def _to_tensor(content: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


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
