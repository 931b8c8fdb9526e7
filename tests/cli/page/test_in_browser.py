"""The pages of `--html` in a real browser: on a phone, in the dark, by keyboard, and with hostile names.

Needs the dependency group `browser` and Chromium: `apt-get install chromium`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import Spec, build
from tests.tiny import run_cli, save_adapter

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    Browser = Page = sync_playwright = None

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if sync_playwright is None or CHROMIUM is None:
    missing = "Chromium" if sync_playwright else "the dependency group `browser`"
    if os.environ.get("LORASHARD_REQUIRE_BROWSER", "") not in ("", "0"):
        pytest.fail(f"{missing} is missing")
    pytest.skip(f"{missing} is missing", allow_module_level=True)

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def plan_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts on 3 ranks, the last two untrained, layer 1 with a placement of its own."""
    folder = tmp_path_factory.mktemp("plan")
    spec = Spec(num_experts=16, num_layers=3, experts=tuple(range(14)))
    adapter = build(spec).write(
        folder / "an-adapter-with-a-long-name-that-nobody-can-break-anywhere"
    )
    ranks = [list(range(6)), list(range(6, 11)), list(range(11, 16))]
    layers = {"1": [ranks[1], ranks[0], ranks[2]]}
    (folder / "map.json").write_text(json.dumps({"ranks": ranks, "layers": layers}))
    page = folder / "page.html"
    done = run_cli(
        "plan", adapter, "--ep-size", 3, "--expert-map", folder / "map.json", "--num-experts", 16,
        "--html", page,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return page


def opened(browser: Browser, path: Path, **context: Any) -> Page:
    """The page, of which anything that is loaded, run or complained about fails the test."""
    page: Page = browser.new_context(**context).new_page()
    unwanted: list[str] = []
    page.on("console", lambda message: unwanted.append(message.text))
    page.on("dialog", lambda dialog: unwanted.append(dialog.message))
    page.on("request", lambda request: unwanted.append(request.url))
    page.goto(path.as_uri())
    assert unwanted == [path.as_uri()]
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_fits_and_its_text_stands_out(browser, plan_page, size, scheme) -> None:
    page = opened(browser, plan_page, viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    colours = page.evaluate("""() => [...document.querySelectorAll("h1, td, th, dt, li, b, caption, summary, p")]
        .filter(e => e.offsetParent).map(e => {
            let behind = e;
            while (getComputedStyle(behind).backgroundColor == "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
        })""")
    assert len(colours) > 50
    assert min(contrast(*pair) for pair in colours) >= 4.5
    assert (brightness(colours[0][1]) < 0.1) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_untrained_cells_and_the_most_bytes_stand_out(browser, plan_page, scheme) -> None:
    page = opened(browser, plan_page, color_scheme=scheme)
    behind = page.evaluate("getComputedStyle(document.querySelector('.map svg')).backgroundColor")
    most = page.evaluate("getComputedStyle(document.querySelector('.map .s5')).fill")
    hollow = page.evaluate("getComputedStyle(document.querySelector('.map .s0')).stroke")
    assert contrast(most, behind) >= 3
    assert contrast(hollow, behind) >= 3


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_cells_are_where_their_experts_are(browser, plan_page, size) -> None:
    """Rank 2 holds experts 11 to 15 of 16; 14 and 15 are hollow."""
    page = opened(browser, plan_page, viewport=size)
    strip = page.get_by_role("img", name="rank 2: experts 11-15; untrained 14-15", exact=True).first
    box = strip.bounding_box()
    assert box["width"] >= 100, "there is something to see"
    for shade, (first, end) in {".s5": (11, 14), ".s0": (14, 16)}.items():
        left, right = strip.locator(shade).evaluate(
            "e => { const b = e.getBoundingClientRect(); return [b.left, b.right] }"
        )
        shown = [16 * (x - box["x"]) / box["width"] for x in (left, right)]
        assert shown == pytest.approx([first, end], abs=0.2)


def test_a_cell_of_some_layers_has_half_the_height(browser, plan_page) -> None:
    """Experts 0 to 5 are on rank 0, but for layer 1, where they are on rank 1."""
    page = opened(browser, plan_page)
    heights = (
        page.locator(".map")
        .first.locator("tbody svg")
        .evaluate_all(
            "rows => rows.map(r => Math.max(...[...r.querySelectorAll('path')].map(p => p.getBBox().height)))"
        )
    )
    assert heights == [0.5, 0.5, 1]


def test_everything_can_be_reached_by_keyboard(browser, plan_page) -> None:
    page = opened(browser, plan_page, viewport=PHONE)
    regions = page.get_by_role("region").count()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML.slice(0, 120)"))
        closed = "document.activeElement.matches('details:not([open]) > summary')"
        if page.evaluate(closed):
            page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    assert len([html for html in reached if 'role="region"' in html]) == regions + 2
    scrolled = page.locator("[role=region]").last
    scrolled.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=scrolled.element_handle())


def test_a_screen_reader_hears_ranks_columns_and_pictures(browser, plan_page) -> None:
    page = opened(browser, plan_page)
    table = page.get_by_role("table", name="Experts by ranks, all 3 layers together")
    assert table.get_by_role("columnheader").all_inner_texts()[2:] == [
        "experts",
        "untrained",
        "bytes",
    ]
    assert table.get_by_role("rowheader").all_inner_texts() == ["rank 0", "rank 1", "rank 2"]
    assert table.get_by_role("img").count() == 3
    assert page.get_by_role("main").count() == page.get_by_role("heading", level=1).count() == 1


def test_a_hostile_name_runs_nothing(browser, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)><script>alert(2)<"
    adapter = save_adapter(tmp_path / name)
    run_cli("inspect", adapter, "--html", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    assert page.get_by_role("heading", level=1).inner_text().endswith(name)
    assert page.locator("img, script").count() == 0


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, from 1 to 21."""
    light, dark = sorted((brightness(one), brightness(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def brightness(colour: str) -> float:
    """WCAG's relative luminance of "rgb(1, 2, 3)"."""
    channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
