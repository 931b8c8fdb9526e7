"""Draw the ratios to the rivals as an SVG bar chart. The same rows give the same bytes."""

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from tests.bench.rows import Row

_WIDTH = 760
_LABEL_WIDTH = 230  # names of the bars, left of the axis
_VALUE_WIDTH = 90  # room for a number right of the longest bar
_TOP = 66
_BOTTOM = 52
_BAR_STEP = 28
_BAR_HEIGHT = 16
_HEADING_STEP = 30

_HEADINGS = {"per_expert": "adapter with one tensor per expert", "fused": "fused adapter"}
_INK, _GRID, _BACKGROUND = "#222222", "#dddddd", "#ffffff"
_BAR, _MISSED, _TARGET = "#4878a8", "#c8703c", "#111111"


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" {extra}>{escape(text)}</text>'


def _line(x: float, top: float, bottom: float, colour: str, width: float) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"'
        f' stroke="{colour}" stroke-width="{width}"/>'
    )


def _limit(row: Row) -> float | None:
    return row.target.limit if row.target and row.target.unit == "x" else None


def _axis_end(rows: Sequence[Row]) -> float:
    longest = max(max(row.ratio or 0, _limit(row) or 0) for row in rows)
    return max(1.5, math.ceil(longest * 4) / 4)


def _axis(end: float, bottom: float, scale: float) -> Iterator[str]:
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 100) if end / step <= 10)
    for tick in range(math.floor(end / step) + 1):
        x = _LABEL_WIDTH + tick * step * scale
        yield _line(x, _TOP, bottom, _GRID, 1)
        yield _text(x, bottom + 16, f"{tick * step:g}×", 'text-anchor="middle"')
    # The plain tool itself is at 1.
    yield _line(_LABEL_WIDTH + scale, _TOP, bottom, _INK, 1.5)


def _bar(row: Row, y: float, scale: float) -> Iterator[str]:
    ratio, limit = row.ratio or 0, _limit(row)
    label = f"{row.what} vs {row.rival}"
    yield _text(_LABEL_WIDTH - 8, y + 12.5, label, 'text-anchor="end"')
    colour = _MISSED if limit is not None and ratio > limit else _BAR
    yield (
        f'<rect x="{_LABEL_WIDTH}" y="{y:.1f}" width="{ratio * scale:.1f}"'
        f' height="{_BAR_HEIGHT}" fill="{colour}"/>'
    )
    if limit is not None:
        yield _line(_LABEL_WIDTH + limit * scale, y - 4, y + _BAR_HEIGHT + 4, _TARGET, 3)
    # Right of the bar and of the target's mark, on its own patch of background, so that
    # no line runs through it.
    value_x = _LABEL_WIDTH + max(ratio, limit or 0) * scale + 8
    patch = f'x="{value_x - 2:.1f}" y="{y:.1f}" width="50" height="{_BAR_HEIGHT}"'
    yield f'<rect {patch} fill="{_BACKGROUND}"/>'
    yield _text(value_x, y + 12.5, f"{ratio:.2f}×", 'font-weight="bold"')


def _legend(y: float) -> Iterator[str]:
    x = _LABEL_WIDTH
    for colour, label, width in (
        (_BAR, "lorashard", 105),
        (_MISSED, "lorashard, over target", 180),
    ):
        yield f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 18, y, label)
        x += width
    yield _line(x + 4, y - 12, y + 4, _TARGET, 3)
    yield _text(x + 14, y, "target")


def draw_chart(rows: Sequence[Row], subtitle: str) -> str:
    """Return the SVG text: one bar per row that has a ratio, grouped by adapter form.

    Rows whose target is in seconds (start-up times) are left out: their ratios, to
    an empty Python, would dwarf the others.
    """
    bars = [row for row in rows if row.ratio and (not row.target or row.target.unit == "x")]
    forms = list(dict.fromkeys(row.form for row in bars))
    bottom = _TOP + _HEADING_STEP * len(forms) + _BAR_STEP * len(bars) + 6
    end = _axis_end(bars)
    scale = (_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / end

    height = bottom + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"',
        f' width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        # Its own background keeps it readable on a dark page.
        f'<rect width="100%" height="100%" fill="{_BACKGROUND}"/>',
        _text(
            16,
            26,
            "Time relative to a plain tool (1× = same time, lower is better)",
            'font-size="16"',
        ),
        _text(16, 46, subtitle, 'font-size="11"'),
        *_axis(end, bottom, scale),
    ]
    y = float(_TOP)
    for form in forms:
        parts.append(_text(16, y + 20, _HEADINGS[form], 'font-weight="bold"'))
        y += _HEADING_STEP
        for row in (row for row in bars if row.form == form):
            parts += _bar(row, y, scale)
            y += _BAR_STEP
    parts += _legend(bottom + 40)
    return "\n".join([*parts, "</svg>\n"])
