"""An exchange to which a rank may never come: the others wait for it some seconds, and no longer.

Others than vLLM add an adapter with steps of their own before (AReaL receives its tensors in them),
and one of these may fail on one rank. An all-gather that a rank does not come to would hold the others
until the group's timeout, and be out of step for good. So these ranks meet in the group's key-value
store: each writes what it has to say, and the first that has heard everything, or has waited for too
long, decides for all whether they have met. A rank that comes to a meeting that was given up goes on
to the next one about the same thing.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from lorashard.vllm_plugin.load.agreement import Exchange, Outcome

LIMIT = timedelta(seconds=30)  # they have their tensors already; adding takes milliseconds
_MET, _GIVEN_UP = "met", "given up"


class Meetings:
    """The meetings of one rank with the others of its group."""

    def __init__(self, store: Any, rank: int, num_ranks: int, limit: timedelta = LIMIT) -> None:
        self.store, self.rank, self.num_ranks, self.limit = store, rank, num_ranks, limit
        self._over: Counter[str] = Counter()  # how many about each thing
        self._keys: list[str] = []  # of this rank's, of meetings that all have come to

    @classmethod
    def of(cls, group: Any) -> Meetings:
        """group: a torch process group. Raises LookupError if it has no store, as only vLLM's own has not."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        store = _get_process_group_store(group)
        return cls(store, dist.get_rank(group), dist.get_world_size(group))

    def about(self, name: str) -> MeetingExchange:
        """The next one about something: an adapter."""
        return MeetingExchange(self, name)

    def key(self, name: str, last: object) -> str:
        """In the store, for the next meeting about something."""
        return f"lorashard/{name}/{self._over[name]}/{last}"

    def skip(self, name: str) -> None:
        """The next meeting is over, without this rank."""
        self._over[name] += 1

    def end(self, name: str, *, met: bool) -> None:
        """The next meeting is over for this rank. met: all have come to it, so all before are read.

        What was said where a rank has not come stays, since it may still come.
        """
        if met:
            keys, self._keys = self._keys, []
            for key in keys:
                self.store.delete_key(key)
            self._keys = [self.key(name, self.rank)]
            if self.rank == 0:
                self._keys.append(self.key(name, "decision"))
        self._over[name] += 1


class MeetingExchange(Exchange):
    """Each rank says one thing and hears what the others say, or that they have not come."""

    def __init__(self, meetings: Meetings, name: str) -> None:
        super().__init__(None)
        self._meetings, self._name = meetings, name
        self._has_said = False
        self._heard: tuple[Outcome, ...] = ()

    @property
    def has_said(self) -> bool:
        """Whether this rank has taken part."""
        return self._has_said

    def say(self, own: Outcome) -> None:
        """Take part. Only what is said first counts."""
        if self._has_said:
            return
        meetings, store = self._meetings, self._meetings.store
        while store.check([meetings.key(self._name, "decision")]):  # without this rank
            meetings.skip(self._name)
        self._has_said = True  # if this fails, the others cannot know whether it has been said
        store.set(meetings.key(self._name, meetings.rank), own.encode())

    def hear(self) -> tuple[Outcome, ...]:
        """What each rank has said, this one too; a failure if one of them has not come in time."""
        if not self._heard:
            self._heard, met = self._meet()
            # If this fails, the next `say` finds the meeting decided.
            self._meetings.end(self._name, met=met)
        return self._heard

    def _meet(self) -> tuple[tuple[Outcome, ...], bool]:
        """What was said, and whether all have come."""
        meetings, store = self._meetings, self._meetings.store
        said = [meetings.key(self._name, rank) for rank in range(meetings.num_ranks)]
        try:
            store.wait(said, meetings.limit)
            wanted = _MET
        except RuntimeError:  # torch's DistStoreError
            wanted = _GIVEN_UP
        # The first rank that comes here decides; the others get what it has set.
        decision = store.compare_set(meetings.key(self._name, "decision"), "", wanted)
        if decision.decode() == _MET:
            return tuple(Outcome.decode(store.get(key)) for key in said), True
        late = [str(rank) for rank, key in enumerate(said) if not store.check([key])]
        return (Outcome(_not_come(late, meetings.limit)),), False


def _not_come(late: list[str], limit: timedelta) -> str:
    who = f"rank {', '.join(late)} of the tensor-parallel group" if late else "a rank"
    return f"{who} did not come to add it within {limit.total_seconds():g} s"
