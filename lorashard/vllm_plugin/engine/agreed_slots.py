"""Which slot holds which adapter, the same on all data-parallel engines. Pure.

In: what each engine says before a step. Out: the next table of slots, and what has to be written into
which. Every engine hears the same and begins with the same table, so all tables stay the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

_BITS = 30  # of a number in a row, which is an int32
_ROWS_AN_ADAPTER = 4  # three for its number, one for its name
MOST_NUMBER = (1 << 3 * _BITS) - 1


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """An adapter as engines speak of it. number: vLLM's lora_int_id. name: a digest, to find mix-ups."""

    number: int
    name: int

    @staticmethod
    def of(number: int, name: str) -> Adapter:
        """From a LoRARequest's fields."""
        return Adapter(number, zlib.crc32(name.encode()) & ((1 << _BITS) - 1))


@dataclass(frozen=True, slots=True)
class Announcement:
    """What an engine says before a step.

    wanted: the adapters of its own tokens. lost: slots that do not hold what the table says, there.
    removed: slots of adapters that it is to remove. has_failed: it cannot say what it wants.
    """

    wanted: tuple[Adapter, ...] = ()
    lost: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()
    has_failed: bool = False

    # Most steps say what the steps before have said.
    @lru_cache(maxsize=1024)  # noqa: B019 - values, and small ones
    def encode(self, num_slots: int) -> tuple[int, ...]:
        """As `num_rows` numbers below 2^30. At most num_slots adapters can be wanted."""
        rows = [int(self.has_failed)]
        for slots in (self.lost, self.removed):
            rows += _digits(sum(1 << slot for slot in slots), _num_mask_rows(num_slots))
        for adapter in self.wanted:
            rows += [*_digits(adapter.number, _ROWS_AN_ADAPTER - 1), adapter.name]
        return (*rows, *(0 for _ in range(num_rows(num_slots) - len(rows))))

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(rows: tuple[int, ...], num_slots: int) -> Announcement:
        """The inverse."""
        num_rows = _num_mask_rows(num_slots)
        begin = 1 + 2 * num_rows
        lost, removed = _number(rows[1 : 1 + num_rows]), _number(rows[1 + num_rows : begin])
        adapters = [
            rows[place : place + _ROWS_AN_ADAPTER]
            for place in range(begin, len(rows), _ROWS_AN_ADAPTER)
        ]
        return Announcement(
            # Numbers begin at 1 in vLLM.
            tuple(Adapter(n, row[-1]) for row in adapters if (n := _number(row[:-1]))),
            frozenset(slot for slot in range(num_slots) if lost >> slot & 1),
            frozenset(slot for slot in range(num_slots) if removed >> slot & 1),
            bool(rows[0]),
        )


def num_rows(num_slots: int) -> int:
    """How many numbers an announcement is."""
    return 1 + 2 * _num_mask_rows(num_slots) + _ROWS_AN_ADAPTER * num_slots


def _num_mask_rows(num_slots: int) -> int:
    return -(-num_slots // _BITS)


def _digits(value: int, count: int) -> list[int]:
    return [value >> _BITS * place & ((1 << _BITS) - 1) for place in range(count)]


def _number(digits: Sequence[int]) -> int:
    return sum(digit << _BITS * place for place, digit in enumerate(digits))


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter that goes into a slot. evicted: what is in it until then."""

    slot: int
    adapter: Adapter
    evicted: Adapter | None = None


@dataclass(frozen=True, slots=True)
class SlotTable:
    """adapters: by slot; None where it is free. last_used: by slot, the number of a step."""

    adapters: tuple[Adapter | None, ...]
    last_used: tuple[int, ...]
    step: int = 0

    @staticmethod
    def empty(num_slots: int) -> SlotTable:
        """Where all slots are free."""
        return SlotTable((None,) * num_slots, (0,) * num_slots)

    def without(self, slots: Iterable[int]) -> SlotTable:
        """The table with these slots free."""
        adapters, last_used = list(self.adapters), list(self.last_used)
        for slot in slots:
            adapters[slot], last_used[slot] = None, 0
        return replace(self, adapters=tuple(adapters), last_used=tuple(last_used))

    def with_all(self, union: Sequence[Adapter]) -> tuple[SlotTable, tuple[Placement, ...]]:
        """The table of the next step, in which all of these adapters have a slot.

        An adapter stays where it is. A new one gets the first free slot, or that of the one that was
        used the longest ago. Raises ValueError if there are more adapters than slots.
        """
        if len(union) > len(self.adapters):
            raise ValueError(
                f"the data-parallel engines use {len(union)} adapters in one step, and --max-loras "
                f"is {len(self.adapters)}"
            )
        step = self.step + 1
        adapters, last_used = list(self.adapters), list(self.last_used)
        placements = []
        for adapter in sorted(set(union) - set(adapters)):
            slot = min(
                (slot for slot, held in enumerate(adapters) if held not in union),
                key=lambda slot: (adapters[slot] is not None, last_used[slot], slot),
            )
            placements.append(Placement(slot, adapter, adapters[slot]))
            adapters[slot] = adapter
        for slot, held in enumerate(adapters):
            if held in union:
                last_used[slot] = step
        return SlotTable(tuple(adapters), tuple(last_used), step), tuple(placements)


def union_of(announcements: Iterable[Announcement], table: SlotTable) -> tuple[Adapter, ...]:
    """The adapters that any engine wants, in order.

    table: without what was lost. Raises ValueError if a number is that of two adapters.
    """
    union = sorted({adapter for said in announcements for adapter in said.wanted})
    names = {adapter.number: adapter.name for adapter in table.adapters if adapter is not None}
    for adapter in union:
        if names.setdefault(adapter.number, adapter.name) != adapter.name:
            raise ValueError(
                f"the number {adapter.number} is that of two adapters with different names. Load "
                "an adapter on all data-parallel engines, under one name and number"
            )
    return tuple(union)


def slot_share(num_slots: int, num_engines: int, engine: int) -> int:
    """How many adapters an engine may use at once, so that all engines together have enough slots."""
    return num_slots // num_engines + (engine < num_slots % num_engines)
