"""The plan of a commit, and those of the last ones.

A training run publishes the same names, shapes and config again and again, and ranks deal them alike.
To plan takes as long as to write half a gigabyte, and comes to the same each time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from lorashard.publish.gathered import GatheredAdapter, Serving, plan_gathered
from lorashard.publish.parts import Part, join_parts
from lorashard.publish.places import PartPlaces, files_with_gaps

_MOST_PLANS = 2
_SOURCE = "the gathered adapter"  # in messages


@dataclass(frozen=True, slots=True)
class PlannedCommit:
    """What all ranks write. writers: of each tensor that several ranks have, the one that writes it.

    gaps: the numbers of the files in which nobody writes some of the bytes.
    """

    adapter: GatheredAdapter
    places: PartPlaces
    writers: Mapping[str, int]
    gaps: Collection[int]


def plan_commit(config: bytes, serving: Serving, parts: Sequence[Sequence[Part]]) -> PlannedCommit:
    """Plan what the ranks have. parts: of each rank.

    Raises AdapterError; LayoutError for what several ranks have, or none.
    """
    joined = join_parts(parts)
    adapter = plan_gathered(config, joined.tensors, serving, _SOURCE)
    entries = {entry.name: entry for entry in adapter.index.tensors}
    places = PartPlaces(adapter.plan, entries)
    return PlannedCommit(adapter, places, joined.writers, files_with_gaps(adapter.plan))


class KeptCommits:
    """The last plans, by all that they depend on. Several threads may use it."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, PlannedCommit] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, form: Hashable, plan: Callable[[], PlannedCommit]) -> PlannedCommit:
        """The kept plan of that form, or a new one."""
        with self._lock:
            found = self._plans.get(form)
        if found is None:
            found = plan()
        with self._lock:
            self._plans[form] = found
            self._plans.move_to_end(form)
            while len(self._plans) > _MOST_PLANS:
                self._plans.popitem(last=False)
        return found
