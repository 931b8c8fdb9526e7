"""The house as its imports draw it: rooms, the floors they stand on, and the arrows between them.

    python -m tests.architecture [CHECKOUT]

A room is a folder or a module directly below `lorashard/`, an arrow an import from one room into
another. A room stands one floor above the highest one that it imports. With a CHECKOUT, another one
(of an earlier commit, say) is counted. `python -m tests.generate_docs` puts the picture into
docs/architecture.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.imports import own_imports, source_files
from tests.tiny import REPO

# Rooms that draw no picture: everything may import them, and they import next to nothing.
_GROUND = frozenset({"dtypes", "errors", "header", "progress", "version", "vllm_options"})
_FACES = frozenset({"", "__main__"})


@dataclass(frozen=True)
class House:
    """arrows: room -> the rooms that it imports. upward: those of them into the package's own face.

    circles: rooms that import each other, also over others; then there are no floors.
    """

    arrows: Mapping[str, frozenset[str]]
    upward: int
    floors: Mapping[str, int]
    circles: tuple[frozenset[str], ...]

    @property
    def num_arrows(self) -> int:
        return sum(map(len, self.arrows.values()))


def read_house(package: Path, within: str = "") -> House:
    """The rooms of a package, or of the folder `within` it."""
    modules = source_files(package)
    found: dict[str, set[str]] = {}
    for module, imported in own_imports(package, modules).items():
        room = _room(module, within)
        if room is None:
            continue
        into = {_room(name, within) for name in imported}
        found.setdefault(room, set()).update(name for name in into if name not in (None, room))
    arrows = {room: frozenset(into) for room, into in sorted(found.items())}
    downward = {room: into - {""} for room, into in arrows.items()}
    upward = sum(len(arrows[room] - into) for room, into in downward.items())
    circles = _circles(downward)
    return House(arrows, upward, {} if circles else _floors(downward), circles)


def _room(module: str, within: str) -> str | None:
    """The room that a module is in; None for what is outside of `within`."""
    if within:
        if not module.startswith(f"{within}."):
            return None
        module = module.removeprefix(f"{within}.")
    return module.partition(".")[0]


def _floors(arrows: Mapping[str, frozenset[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in floors:
            floors[room] = 1 + max(map(floor, arrows[room]), default=0)
        return floors[room]

    for room in arrows:
        floor(room)
    return floors


def _circles(arrows: Mapping[str, frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Sets of rooms that reach each other."""
    reach = {room: _reachable(arrows, room) for room in arrows}
    circles = {
        frozenset(other for other in reach[room] if room in reach[other])
        for room in arrows
        if room in reach[room]
    }
    return tuple(sorted(circles, key=sorted))


def _reachable(arrows: Mapping[str, frozenset[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        room = waiting.pop()
        if room not in found:
            found.add(room)
            waiting += arrows[room]
    return found


def mermaid(house: House) -> str:
    """A picture of the rooms. Arrows point the way that data flows: from the imported to the importer.

    Where one room imports another both directly and over a third, the direct arrow is left out.
    """
    shown = [room for room in house.arrows if room not in _GROUND | _FACES]
    lines = ["flowchart LR"]
    lines += [f"    {room}([{room}])" for room in sorted(shown, key=house.floors.__getitem__)]
    for room in sorted(shown, key=house.floors.__getitem__):
        into = house.arrows[room] - _GROUND - _FACES
        direct = [
            name
            for name in sorted(into)
            if not any(name in _reachable(house.arrows, other) for other in into - {name})
        ]
        lines += [f"    {name} --> {room}" for name in direct]
    return "\n".join(lines) + "\n"


def main() -> None:
    package = Path(sys.argv[1]) / "lorashard" if len(sys.argv) > 1 else REPO / "lorashard"
    house = read_house(package)
    for room in sorted(house.arrows, key=lambda room: -house.floors.get(room, 0)):
        name = room or "__init__"
        into = ", ".join(sorted(other or "__init__" for other in house.arrows[room]))
        print(f"floor {house.floors.get(room, '?'):>2}  {name:<14} {into}")
    for circle in house.circles:
        print("circle:", ", ".join(sorted(circle)))
    print(
        f"{len(house.arrows)} rooms, {max(house.floors.values(), default=0)} floors, "
        f"{house.num_arrows} arrows, {house.upward} of them up, {len(house.circles)} circles"
    )


if __name__ == "__main__":
    main()
