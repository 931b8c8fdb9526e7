"""Maps of experts: a table with a drawn strip in each row, from one edge (expert 0) to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from lorashard.cli import render
from lorashard.cli.page.markup import Html, joined, name_of, tag
from lorashard.inspect.picture import LEVELS, NOT_HERE, UNTRAINED, ExpertMap, MapRow

MOST_ROWS = 256  # of a map
_MOST_TICKS = 6
_STEPS = (1, 2, 4, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512)


def expert_map(picture: ExpertMap, caption: str, first_column: str) -> Html:
    """A map, and its numbers beside it.

    first_column: what the names of rows are; empty for ranks, whose names say it.
    """
    head = tag(
        "tr",
        tag("th", first_column, scope="col"),
        tag("th", _ticks(picture.num_experts), scope="col", class_="cells"),
        tag("th", "experts", scope="col", class_="n spare"),
        tag("th", "untrained", scope="col", class_="n"),
        tag("th", "bytes", scope="col", class_="n"),
    )
    body = joined(_row(row, picture.num_experts) for row in picture.rows)
    shown = len(picture.rows)
    more = (
        tag("p", f"The first {shown} of {picture.num_rows} rows are shown.", class_="quiet")
        if shown < picture.num_rows
        else Html("")
    )
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", body),
        class_="map names" if first_column else "map",
    )
    return joined([scrollable(table, caption), more])


def legend() -> Html:
    """What the shades and shapes mean."""
    entries = [
        (_strip((level,), frozenset()), text)
        for level, text in (
            (1, "fewest bytes"), (LEVELS, "most bytes"), (UNTRAINED, "here, but not trained: zeros"),
        )
    ]  # fmt: skip
    entries.append((_strip((LEVELS,), frozenset({0})), "half height: in some layers only"))
    entries.append((_strip((NOT_HERE,), frozenset()), "not here"))
    return tag("ul", *(tag("li", strip, " ", text) for strip, text in entries), class_="legend")


def scrollable(table: Html, label: str) -> Html:
    """A table that scrolls by itself where it is wider than the screen, by keyboard as well."""
    return tag("div", table, class_="wide", tabindex=0, role="region", aria_label=label)


def _row(row: MapRow, num_experts: int) -> Html:
    untrained = [expert for expert in range(num_experts) if row.levels[expert] == UNTRAINED]
    title = f"{row.name}: experts {render.ids(row.experts)}"
    if untrained:
        title += f"; untrained {render.ids(untrained)}"
    return tag(
        "tr",
        tag("th", name_of(row.name), scope="row"),
        tag("td", _strip(row.levels, row.partly, title), class_="cells"),
        tag("td", str(len(row.experts)), class_="n spare"),
        tag("td", str(len(untrained)), class_="n"),
        tag("td", render.size(row.trained_bytes), class_="n"),
    )


def _strip(levels: Sequence[int], partly: frozenset[int], title: str | None = None) -> Html:
    """The cells of one row, drawn in a box that is as many units wide as there are experts."""
    paths = [
        tag("path", class_=f"s{level}", d="".join(drawn))
        for level in (*range(1, LEVELS + 1), UNTRAINED)
        if (drawn := list(_cells(levels, partly, level)))
    ]
    named = {"role": "img", "aria_label": title} if title else {"aria_hidden": "true"}
    text = [tag("title", title)] if title else []
    return tag(
        "svg", *text, *paths, viewBox=f"0 0 {len(levels)} 1", preserveAspectRatio="none", **named
    )


def _cells(levels: Sequence[int], partly: frozenset[int], level: int) -> Iterator[str]:
    """Path commands for the runs of neighbours with this level."""
    for (found, half), run in groupby(
        range(len(levels)), key=lambda expert: (levels[expert], expert in partly)
    ):
        if found == level:
            first, *_ = experts = list(run)
            top, height = (".5", ".5") if half else ("0", "1")
            yield f"M{first} {top}h{len(experts)}v{height}h-{len(experts)}z"


def _ticks(num_experts: int) -> Html:
    step = next((s for s in _STEPS if num_experts <= s * _MOST_TICKS), num_experts)
    marks = [
        tag("span", str(expert), style=f"left:{100 * expert / num_experts:.2f}%")
        for expert in range(0, num_experts, step)
    ]
    return tag("div", *marks, class_="ticks")
