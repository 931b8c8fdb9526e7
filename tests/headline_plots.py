"""The README's two plots, from docs/gpu/*.json: how far served adapters are from what is right, and how
long a load takes, by vLLM alone and with lorashard. The same results give the same bytes.

Each is an SVG with a background of its own, light or dark as the reader's browser is set. `make docs`
writes them (tests/generate_docs.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

RELEASE = "0.33.0"
ALONE, WITH = "vLLM alone", "with lorashard"
# The cases that differ in nothing but how experts are placed, as the README's table has them.
CASES = {
    "glm16": "16 experts, linear",
    "glm15": "15 experts (8 + 7)",
    "glm16g2-rr": "16 experts, round-robin",
    "glm16-fs": "--fully-sharded-loras",
    "glm16-eplb": "--enable-eplb, rebalanced",
}
ADAPTERS = ("e0", "e1", "e2")  # those that vLLM alone loads in every case
LOADS = {
    ("per_expert", "first_load_s"): "tensor per expert, first load",
    ("per_expert", "later_load_s"): "tensor per expert, later loads",
    ("fused", "first_load_s"): "fused, first load",
    ("fused", "later_load_s"): "fused, later loads",
}

_WIDTH, _LEFT, _RIGHT = 720, 310, 690  # of the picture; where an axis begins and ends
_TOP, _STEP, _GAP = 84, 19, 12
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1d2430; } .quiet { fill: #5a6472; font-size: 12px; }
.title { font-size: 16px; font-weight: 600; } .page { fill: #ffffff; } .grid { stroke: #d5dae1; }
.noise { fill: #e3e8ee; } .right { fill: #2166ac; } .wrong { stroke: #b4540a; fill: none; stroke-width: 2.5; }
.alone { fill: #b4540a; } .end { text-anchor: end; } .middle { text-anchor: middle; }
@media (prefers-color-scheme: dark) { text { fill: #e4e8ee; } .quiet { fill: #a2acba; }
  .page { fill: #12161c; } .grid { stroke: #333b47; } .noise { fill: #262e38; } .right { fill: #7db8f0; }
  .wrong { stroke: #f0a050; } .alone { fill: #f0a050; } }
"""


@dataclass(frozen=True)
class Answers:
    """One engine's answers: each adapter's distance from the reference, and whether that is right.

    note: why there are none. noise: the base model's own distance.
    """

    case: str
    who: str
    errors: tuple[tuple[float, bool], ...]
    noise: float
    note: str = ""


def plots(folder: Path) -> dict[str, str]:
    """Name of a picture in docs/ -> its SVG."""
    ours, stock, eplb = (
        json.loads((folder / f"{RELEASE}{kind}.json").read_text()) for kind in ("", "-stock", "-eplb")
    )  # fmt: skip
    answers = list(answers_of(ours, stock, eplb))
    return {"answers.svg": draw_answers(answers), "loads.svg": draw_loads(ours["load"]["summary"])}


def answers_of(
    ours: Mapping[str, Any], stock: Mapping[str, Any], eplb: Mapping[str, Any]
) -> Iterator[Answers]:
    """Of each case, vLLM alone and then with lorashard."""
    for name in CASES:
        for who, document in ((ALONE, stock), (WITH, ours)):
            cases = [case for case in document["cases"] if case["case"] == name]
            if name == "glm16-eplb" and who == WITH:
                cases = [
                    case for case in eplb["eplb"]["cases"] if "FP8" not in case.get("flags", "FP8")
                ]
            results = [result for case in cases for result in case["results"]]
            noise = [r["error"] for r in results if "base" in r and "after" not in r]
            found = {
                (r["error"], r["right"])
                for r in results
                if r.get("adapter") in ADAPTERS and r.get("form") == "plain" and "error" in r
            }
            note = "" if found else f"does not start ({cases[0]['last_error'].partition(':')[0]})"
            yield Answers(name, who, tuple(sorted(found)), max(noise, default=0.0), note)


def draw_answers(answers: Sequence[Answers]) -> str:
    """Dots: right ones are blue discs, wrong ones are orange crosses."""
    largest = max(error for one in answers for error, _ in one.errors)
    scale = (_RIGHT - _LEFT) / largest
    noise = max(one.noise for one in answers)
    height = _bottom(len(answers)) + 48
    band = f'y="{_TOP - 8}" height="{_bottom(len(answers)) - _TOP + 8}"'
    parts = [
        f'<rect class="noise" x="{_LEFT}" width="{noise * scale:.1f}" {band}/>',
        *_axis(largest, 0.05, scale, _bottom(len(answers)), "{:.2f}"),
    ]
    for number, one in enumerate(answers):
        y = _row(number)
        parts += _labels(y, CASES[one.case] if number % 2 == 0 else "", one.who)
        for error, right in one.errors:
            x = _LEFT + error * scale
            parts.append(
                f'<circle class="right" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' if right else
                f'<path class="wrong" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
            )  # fmt: skip
        if one.note:
            parts.append(_text(_LEFT + 8, y + 4.5, one.note))
    below = _bottom(len(answers)) + 36
    parts += [
        f'<circle class="right" cx="21" cy="{below - 4}" r="4.5"/>',
        _text(32, below, "right"),
        f'<path class="wrong" d="M86 {below - 8}l8 8m0 -8l-8 8"/>',
        _text(102, below, "wrong, without an error"),
        f'<rect class="noise" x="{_LEFT - 10}" y="{below - 10}" width="14" height="12"/>',
        _text(_LEFT + 10, below, "as far as the base model alone: noise"),
    ]
    wrong = sum(not right for one in answers for _, right in one.errors if one.who == WITH)
    title = "Served adapters, and how far they are from what is right"
    subtitle = (
        f"vLLM {RELEASE}, two GPUs, three adapters each: mean difference of log-probabilities from a "
        "float32 reference"
    )
    told = (
        f"{title}. With lorashard {'all are right' if not wrong else f'not all are right ({wrong} wrong)'}; vLLM alone is "
        f"wrong with {_listed([CASES[a.case] for a in answers if not all(r for _, r in a.errors)])}."
    )
    return _picture(height, title, subtitle, told, parts)


def draw_loads(summary: Mapping[str, Any]) -> str:
    """Two bars for each kind of adapter, in seconds."""
    pairs = {label: summary[form][what] for (form, what), label in LOADS.items()}
    longest = max(map(max, pairs.values()))
    scale = (_RIGHT - 40 - _LEFT) / longest
    rows = [(label, who, s) for label, pair in pairs.items() for who, s in zip((ALONE, WITH), pair)]
    parts = list(_axis(longest, 0.5, scale, _bottom(len(rows)), "{:g} s"))
    for number, (label, who, seconds) in enumerate(rows):
        y = _row(number)
        parts += _labels(y, label if number % 2 == 0 else "", who)
        kind = "alone" if who == ALONE else "right"
        parts.append(
            f'<rect class="{kind}" x="{_LEFT}" y="{y - 6:.1f}" width="{seconds * scale:.1f}" height="12"/>'
        )
        times = f"{pairs[label][0] / seconds:.0f}×" if who == WITH else ""
        shown = f"{seconds:.2f} s" if who == ALONE else f"{seconds:.3f} s, {times} faster"
        parts.append(_text(_LEFT + seconds * scale + 6, y + 4.5, shown))
    title = "Seconds to load an adapter"
    subtitle = (
        f"vLLM {RELEASE} on two H200, shapes of GLM-4.5-Air with 8 MoE layers, r=32; less is better"
    )
    told = "; ".join(f"{label}: {a:.2f} s alone, {b:.3f} s" for label, (a, b) in pairs.items())
    return _picture(
        _bottom(len(rows)) + 28, title, subtitle, f"{title}. {told} with lorashard.", parts
    )


def _row(number: int) -> float:
    """The middle of a row; a gap follows each pair."""
    return _TOP + number * _STEP + number // 2 * _GAP + _STEP / 2


def _bottom(count: int) -> float:
    return _row(count - 1) + _STEP / 2 + 6


def _axis(end: float, step: float, scale: float, bottom: float, form: str) -> Iterator[str]:
    for tick in range(int(end / step + 1e-9) + 1):
        x = _LEFT + tick * step * scale
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
        yield _text(x, bottom + 14, form.format(tick * step), "quiet middle")


def _labels(y: float, left: str, who: str) -> Iterator[str]:
    if left:
        yield _text(16, y + _STEP / 2 + 4.5, left)
    yield _text(_LEFT - 10, y + 4.5, who, "quiet end")


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _picture(height: float, title: str, subtitle: str, told: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img" aria-labelledby="what"><title id="what">{escape(told)}</title>'
    )
    return "\n".join([
        head, f"<style>{_STYLE}</style>", '<rect class="page" width="100%" height="100%"/>',
        _text(16, 30, title, "title"), _text(16, 52, subtitle, "quiet"), *parts, "</svg>\n",
    ])  # fmt: skip
