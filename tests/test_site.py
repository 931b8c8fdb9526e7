"""The documentation as a site: it builds without a warning, its links lead somewhere, it loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.tiny import REPO

CONFIG = REPO / "docs" / "site" / "mkdocs.yml"
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
NO_LOAD = {"canonical", "next", "prev"}  # kinds of <link> that a browser does not fetch


class Page(HTMLParser):
    """A page's anchors, what it links to and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors.add(values.get("id", ""))
        if name == "a" and "href" in values:
            self.links.add(values["href"])
        elif name in LOADED and not NO_LOAD & set(values.get("rel", "").split()):
            self.loads.add(values.get(LOADED[name], ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        assert "LORASHARD_REQUIRE_ALL" not in os.environ, "the dependency group `site` is missing"
        pytest.skip("the dependency group `site` is missing")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", CONFIG, "-d", out],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_of_the_documentation_is_in_the_navigation(site: Path) -> None:
    wanted = {path.relative_to(REPO / "docs") for path in (REPO / "docs").rglob("*.md")}
    names = {"README.md": "index.html"}
    expected = [site / path.parent / names.get(path.name, f"{path.stem}.html") for path in wanted]
    assert len(expected) > 12
    assert [path for path in expected if not path.exists()] == []


def test_links_and_anchors_resolve(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or not link:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target / "index.html" if target.is_dir() else target
            if not found.exists() or (
                parts.fragment
                and found in pages
                and unquote(parts.fragment) not in pages[found].anchors
            ):
                wrong.append((path.relative_to(site).as_posix(), link))
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loads = {load for page in pages.values() for load in page.loads}
    assert any(load.endswith(".js") for load in loads)
    assert [load for load in loads if urlsplit(load).netloc] == []


def test_what_a_list_or_a_fold_holds_is_markup_and_not_text(site: Path) -> None:
    """GitHub reads these with two spaces, and Markdown within <details>."""
    readme = (site / "index.html").read_text()
    assert "```" not in readme
    architecture = (site / "architecture.html").read_text()
    assert "|---|" not in architecture
    assert "<li><code>storage</code> → <code>adapter</code></li>" in architecture
    assert "source/lorashard/split/pipeline.py.txt" in architecture
    copied = site / "source" / "lorashard" / "split" / "pipeline.py.txt"
    assert copied.read_text() == (REPO / "lorashard" / "split" / "pipeline.py").read_text()


def test_the_start_links_to_every_way_in() -> None:
    nav = yaml.safe_load(CONFIG.read_text())["nav"]
    titles = [title for entry in nav for title in entry]
    assert titles[:4] == ["Start", "Do I need this?", "How it works", "Commands"]
    assert {"Serving", "Training", "Troubleshooting", "Releases", "Security"} <= set(titles)
