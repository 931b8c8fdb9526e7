"""The README's plots show what was recorded, wrong answers of lorashard's too."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree as ET

import pytest

from tests.headline_plots import (
    ALONE,
    CASES,
    RELEASE,
    WITH,
    answers_of,
    draw_answers,
    draw_loads,
    plots,
)
from tests.tiny import REPO

FOLDER = REPO / "docs" / "gpu"
OURS, STOCK, EPLB = (
    json.loads((FOLDER / f"{RELEASE}{kind}.json").read_text()) for kind in ("", "-stock", "-eplb")
)


def test_every_case_has_vllm_alone_and_then_lorashard() -> None:
    answers = list(answers_of(OURS, STOCK, EPLB))
    assert [(one.case, one.who) for one in answers] == [
        (c, w) for c in CASES for w in (ALONE, WITH)
    ]
    assert all(one.errors or one.note for one in answers)


def test_the_readme_s_table_has_the_plot_s_figures() -> None:
    table = (REPO / "README.md").read_text()
    found = {(one.case, one.who): one for one in answers_of(OURS, STOCK, EPLB)}
    for case in ("glm16", "glm15", "glm16g2-rr"):
        for who in (ALONE, WITH):
            for error, _ in found[case, who].errors:
                assert f"{error:.3f}" in table, (case, who)


def test_a_wrong_answer_is_a_cross_whoever_gave_it() -> None:
    ours = copy.deepcopy(OURS)
    (case,) = [case for case in ours["cases"] if case["case"] == "glm16"]
    result = next(r for r in case["results"] if r.get("adapter") == "e0" and r["form"] == "plain")
    before = draw_answers(list(answers_of(ours, STOCK, EPLB)))
    result.update(error=0.2, right=False)
    after = draw_answers(list(answers_of(ours, STOCK, EPLB)))
    assert after.count('class="wrong"') == before.count('class="wrong"') + 1
    assert "With lorashard all are right" in before
    assert "not all are right (1 wrong)" in after


def test_bars_are_as_long_as_the_loads_took() -> None:
    drawn = draw_loads(OURS["load"]["summary"])
    widths = [
        float(w) for w in re.findall(r'class="(?:alone|right)"[^>]* width="([0-9.]+)"', drawn)
    ]
    seconds = [
        s
        for form in ("per_expert", "fused")
        for what in ("first_load_s", "later_load_s")
        for s in OURS["load"]["summary"][form][what]
    ]
    scale = max(widths) / max(seconds)
    assert widths == pytest.approx([s * scale for s in seconds], abs=0.2)


@pytest.mark.parametrize("name", plots(FOLDER))
def test_a_plot_is_xml_with_a_text_for_screen_readers(name: str) -> None:
    picture = ET.fromstring(plots(FOLDER)[name])
    title = picture.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert "lorashard" in (title.text or "")
    assert f"](docs/{name})" in (REPO / "README.md").read_text()
