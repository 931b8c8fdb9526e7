"""The house as its imports draw it: its rooms, the floors they stand on, the arrows between them.

    python -m tests.architecture [CHECKOUT]

A room is a folder or a module directly below `lorashard/` (or below a folder of it); an arrow is an
import from one room into another. A room stands one floor above the highest room that it imports.
CHECKOUT counts another working tree, of an earlier commit for example. docs/architecture.md draws
the same house (tests/architecture_page.py).
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.imports import own_imports, source_files
from tests.tiny import REPO

PLUGIN = "vllm_plugin"

# Left out of the picture: everything may import these, and they import next to nothing.
GROUND = frozenset(
    {
        "dtypes",
        "errors",
        "header",
        "installing",
        "parameters",
        "progress",
        "rules",
        "version",
        "vllm_options",
    }
)
_FACES = frozenset({"", "__main__"})
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class House:
    """arrows: room -> the rooms that it imports. Room "" is the package's own face, `__init__`.

    upward: how many arrows point into the face. circles: rooms that import each other, also by way
    of others. floors: room -> its floor, from 1; empty if there are circles.
    """

    arrows: Mapping[str, frozenset[str]]
    upward: int
    floors: Mapping[str, int]
    circles: tuple[frozenset[str], ...]

    @property
    def num_arrows(self) -> int:
        return sum(map(len, self.arrows.values()))

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        return (
            f"{len(self.arrows)} rooms on {max(self.floors.values(), default=0)} floors, "
            f"{self.num_arrows} arrows, {self.upward} pointing up, {len(self.circles)} circles"
        )

    def top_down(self) -> list[str]:
        """Rooms by floor, the highest first, then by name."""
        return sorted(self.arrows, key=lambda room: (-self.floors.get(room, 0), room))


def read_house(package: Path, within: str = "") -> House:
    """The rooms of a package, or of the folder `within` it (a dotted name)."""
    modules = source_files(package)
    targets: dict[str, set[str]] = {}
    for module, imported in own_imports(package, modules).items():
        room = _room(module, within)
        if room is None:
            continue
        rooms = {_room(name, within) for name in imported}
        targets.setdefault(room, set()).update(name for name in rooms if name not in (None, room))
    arrows = {room: frozenset(into) for room, into in sorted(targets.items())}
    downward = {room: into - {""} for room, into in arrows.items()}
    upward = sum(len(arrows[room] - into) for room, into in downward.items())
    circles = _circles(downward)
    return House(arrows, upward, {} if circles else _floors(downward), circles)


def _room(module: str, within: str) -> str | None:
    """The room that a module is in; None for a module outside of `within`."""
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
    reached: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        room = waiting.pop()
        if room not in reached:
            reached.add(room)
            waiting += arrows[room]
    return reached


def mermaid(house: House) -> str:
    """A picture of the rooms. Arrows point the way data flows: from the imported to the importer.

    Where a room imports another both directly and by way of a third, the direct arrow is left out.
    """
    rooms = sorted(house.arrows, key=lambda room: (house.floors.get(room, 0), room))
    shown = [room for room in rooms if room not in GROUND | _FACES]
    lines = ["flowchart LR", *(f"    {room}([{room}])" for room in shown)]
    for room in shown:
        into = house.arrows[room] - GROUND - _FACES
        direct = [
            name
            for name in sorted(into)
            if not any(name in _reachable(house.arrows, other) for other in into - {name})
        ]
        lines += [f"    {name} --> {room}" for name in direct]
    return "\n".join(lines) + "\n"


def report(package: Path, within: str = "") -> Iterator[str]:
    """Lines to read: the counts, then every room from the top floor down with what it imports."""
    house = read_house(package, within)
    name = "/".join((package.name, *filter(None, within.split("."))))
    yield f"{name}/: {house.summary}"
    yield ""
    longest = max(len(room or "__init__") for room in house.arrows)
    yield f"floor  {'room':<{longest}}  imports"
    for room in house.top_down():
        into = ", ".join(sorted(other or "__init__" for other in house.arrows[room])) or "-"
        left = f"{house.floors.get(room, '?'):>5}  {room or '__init__':<{longest}}  "
        yield textwrap.fill(
            into, _WIDTH, initial_indent=left, subsequent_indent=" " * len(left)
        ).rstrip()
    for circle in house.circles:
        yield f"circle: {', '.join(sorted(circle))}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.architecture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", nargs="?", type=Path, default=REPO, metavar="CHECKOUT")
    package = parser.parse_args().checkout / "lorashard"
    if not (package / "__init__.py").is_file():
        parser.error(f"{package} is not a package")
    print("\n".join(report(package)))
    if (package / PLUGIN).is_dir():
        print("", *report(package, PLUGIN), sep="\n")


if __name__ == "__main__":
    main()
