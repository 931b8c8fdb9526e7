"""Copies of an expert, in files that are read front to back: whether they are equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blake3 import blake3

from lorashard.reshard.moves import Stretch
from lorashard.shards.plan import Target


class CopyDigests:
    """The BLAKE3 of each copy, taken while its file is read for another reason."""

    def __init__(self, copies: Sequence[Sequence[Stretch]], num_files: int) -> None:
        """copies: those of each factor that is there several times."""
        self._copies = copies
        self._digests: dict[Stretch, bytes] = {}
        self._begun = [blake3() for _ in range(num_files)]
        self._waiting: list[list[Stretch]] = [[] for _ in range(num_files)]
        places = (place for group in copies for place in group)
        for place in sorted(places, key=lambda place: place.begin, reverse=True):
            self._waiting[place.file].append(place)  # the next one is the last

    def update(self, file: int, data: memoryview, begin: int) -> None:
        """Take the bytes of a file that begin at `begin`, where those of the last call ended."""
        waiting, end = self._waiting[file], begin + len(data)
        while waiting and waiting[-1].begin < end:
            place = waiting[-1]
            self._begun[file].update(data[max(0, place.begin - begin) : place.end - begin])
            if place.end > end:
                return
            waiting.pop()
            self._digests[place] = self._begun[file].digest()
            self._begun[file] = blake3()

    def find_different(self) -> Iterator[tuple[Target, str]]:
        """Each copy that differs from the first one of its factor, once all files are read."""
        for first, *others in self._copies:
            for other in others:
                if self._digests[other] != self._digests[first]:
                    place = Target(other.file, other.begin)
                    yield place, "differs from another copy of the same expert"
