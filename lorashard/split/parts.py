"""A list of adapters in parts, one for each machine: disjoint, together the list, as equal as can be. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorashard.errors import AdapterError

_T = TypeVar("_T")
_NUMBERED = "Parts are numbered from 0: the first of 8 is 0/8, the last 7/8."
_FORM = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count`, numbered from 0. Raises AdapterError for one that does not exist."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise AdapterError(f"There is no part {self.index}/{self.count}.", hint=_NUMBERED)

    def of(self, items: Sequence[_T]) -> tuple[_T, ...]:
        """Every count-th item, from the index-th on, so that neighbours go to different parts."""
        return tuple(items[self.index :: self.count])


def parse_part(text: str) -> Part:
    """`I/N` as a Part. Raises AdapterError."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise AdapterError(f"{text[:40]!r} is not a part, I/N.", hint=_NUMBERED)
    return Part(int(found[1]), int(found[2]))
