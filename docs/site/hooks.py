"""What `mkdocs build` does beside building docs/: the pages of the top folder, links to source files, and Markdown
as GitHub reads it.

A page of the site is the file as it stands in the repository. A link to a file outside of docs/ becomes a link to its
page on the site, or to a copy of it, so that the site needs no repository elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
# The top folder's pages, by their names on the site.
TOP = {
    "index.md": REPO / "README.md",
    "changelog.md": REPO / "CHANGELOG.md",
    "contributing.md": REPO / "CONTRIBUTING.md",
    "security-policy.md": REPO / "SECURITY.md",
}
_ON_SITE = {path: name for name, path in TOP.items()}
_FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


class TwoSpaces(Extension):
    """What belongs to an item of a list is indented by two spaces, as GitHub has it."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.tab_length = 2


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(TwoSpaces())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, path in TOP.items():
        files.append(File.generated(config, name, content=path.read_text()))
    for path in sorted({target for page in _pages() for target in _outside(page)}):
        files.append(File.generated(config, _copy_of(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    source = TOP.get(page.file.src_uri, DOCS / page.file.src_uri)
    here = Path(page.file.src_uri).parent

    def rewritten(link: re.Match[str]) -> str:
        return _link(link[1], source, here)

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        block = _without_mermaid(fence[0])
        parts += [_LINK.sub(rewritten, markdown[end : fence.start()]), block]
        end = fence.end()
    text = "".join([*parts, _LINK.sub(rewritten, markdown[end:])])
    return text.replace("<details>", '<details markdown="1">')


def _without_mermaid(fence: str) -> str:
    """A picture of arrows as a list, since what draws it would have to be fetched from elsewhere."""
    if not fence.startswith("```mermaid"):
        return fence
    users: dict[str, list[str]] = {}
    for used, user in re.findall(r"^ *(\w+) --> (\w+)$", fence, re.MULTILINE):
        users.setdefault(used, []).append(f"`{user}`")
    return "".join(f"- `{used}` → {', '.join(names)}\n" for used, names in users.items())


def _pages() -> Iterator[Path]:
    yield from TOP.values()
    yield from (path for path in DOCS.rglob("*.md"))


def _outside(page: Path) -> Iterator[Path]:
    """The files that a page links to and that are not on the site."""
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        target = _target(link, page)
        if target and target not in _ON_SITE and not _is_in_docs(target):
            yield target


def _target(link: str, page: Path) -> Path | None:
    """The file of a relative link."""
    name = link.partition("#")[0]
    return None if not name or re.match(r"[a-z]+:", link) else (page.parent / name).resolve()


def _link(link: str, page: Path, here: Path) -> str:
    target = _target(link, page)
    if target is None:
        return link
    if _is_in_docs(target):
        name = target.relative_to(DOCS).as_posix()
    else:
        name = _ON_SITE.get(target) or _copy_of(target)
    _, mark, anchor = link.partition("#")
    return os.path.relpath(name, here) + mark + anchor


def _is_in_docs(path: Path) -> bool:
    return path.is_relative_to(DOCS) and path.suffix != ".json"


def _copy_of(path: Path) -> str:
    """Where the site has a copy: a text, so that a browser shows it."""
    return f"source/{path.relative_to(REPO).as_posix()}.txt"


def _content(path: Path) -> str:
    if path.is_file():
        return path.read_text()
    return "".join(
        f"{entry.name}\n" for entry in sorted(path.iterdir()) if entry.name[0] not in "._"
    )
