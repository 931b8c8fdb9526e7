"""docs/expert-map.svg: the map that `plan --html` draws, of 16 experts on 3 ranks of which 2 are not trained."""

from __future__ import annotations

from lorashard.inspect.picture import NOT_HERE, UNTRAINED, ModuleExperts, map_of_ranks
from lorashard.shards.placement import linear_placement

_EXPERTS, _RANKS, _UNTRAINED, _LESS = 16, 3, {14, 15}, {4, 9}
_LEFT, _CELL, _STEP, _TOP = 70, 36, 34, 34
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1d2430; } .page { fill: #ffffff; } .empty { fill: #f4f6f9; stroke: #d5dae1; }
.s5 { fill: #164a86; } .s3 { fill: #5c90cd; } .s0 { fill: none; stroke: #b4540a; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) { text { fill: #e4e8ee; } .page { fill: #12161c; }
  .empty { fill: #1b2129; stroke: #333b47; } .s5 { fill: #aed2f7; } .s3 { fill: #3f7fbf; } .s0 { stroke: #f0a050; } }
"""


def draw() -> str:
    """The picture as SVG; experts 4 and 9 have half of the others' r."""
    sizes = tuple(0 if e in _UNTRAINED else 50 if e in _LESS else 100 for e in range(_EXPERTS))
    placed = linear_placement(_EXPERTS, _RANKS)
    picture = map_of_ranks([ModuleExperts("", placed.ranks, sizes, frozenset(_UNTRAINED))], _RANKS)
    width, height = _LEFT + _EXPERTS * _CELL + 16, _TOP + _RANKS * _STEP + 40
    parts = [
        f'<text x="{_LEFT + e * _CELL + _CELL / 2}" y="22" text-anchor="middle">{e}</text>'
        for e in range(_EXPERTS)
    ]
    for number, row in enumerate(picture.rows):
        y = _TOP + number * _STEP
        parts.append(f'<text x="16" y="{y + 17}">{row.name}</text>')
        for expert, level in enumerate(row.levels):
            kind = "empty" if level == NOT_HERE else f"s{level}"
            x, inset = _LEFT + expert * _CELL, 3 if level == UNTRAINED else 1
            parts.append(
                f'<rect class="{kind}" x="{x + inset}" y="{y + inset - 1}" '
                f'width="{_CELL - 2 * inset}" height="{26 - 2 * inset}"/>'
            )
    y = height - 22
    for x, kind, text in (
        (_LEFT, "s5", "most bytes"), (_LEFT + 130, "s3", "half of r"), (_LEFT + 250, "s0", "not trained"),
        (_LEFT + 380, "empty", "elsewhere"),
    ):  # fmt: skip
        parts.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="13"/>')
        parts.append(f'<text x="{x + 22}" y="{y}">{text}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>", '<rect class="page" width="100%" height="100%"/>', *parts, "</svg>\n",
    ])  # fmt: skip
