"""The generated parts of docs/architecture.md: counts, pictures, packages and their modules.

The page is written by hand but for what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.architecture import PLUGIN, House, mermaid, read_house
from tests.imports import source_files


def fill_in(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part between its markers. Raises ValueError unless each has a pair."""
    for name, text in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(marked.findall(page)) != 1:
            raise ValueError(f"the page must have {begin.strip()} and {end} once")
        filled = f"{begin}{text}{end}"
        page = marked.sub(lambda _, filled=filled: filled, page)
    return page


def architecture_parts(package: Path) -> dict[str, str]:
    """Name of a marked part -> its text."""
    house, plugin = read_house(package), read_house(package, PLUGIN)
    return {
        "counts": f"- `lorashard/`: {house.summary}\n- `{PLUGIN}/`: {plugin.summary}\n",
        "picture": _fenced(house),
        "plugin picture": _fenced(plugin),
        "packages": "\n\n".join(_packages(package)) + "\n",
    }


def _fenced(house: House) -> str:
    return f"```mermaid\n{mermaid(house)}```\n"


def _packages(package: Path) -> Iterator[str]:
    """Each package with its docstring's first sentence, and its modules, folded away."""
    modules = source_files(package)
    folders = [name for name, path in modules.items() if path.name == "__init__.py"]
    for folder in sorted(folders, key=_import_order(package)):
        title = folder.replace(".", "/") or package.name
        text = f"**`{title}/`** {first_sentence(modules[folder])}"
        rows = [
            f"| [`{path.stem}`](../{path.relative_to(package.parent)}) | {_cell(path)} |"
            for path in modules.values()
            if path.parent == modules[folder].parent and path.name != "__init__.py"
        ]
        counted = "1 module" if len(rows) == 1 else f"{len(rows)} modules"
        table = [
            "", "<details>", f"<summary>{counted}</summary>", "", "| module | |", "|---|---|",
            *rows, "", "</details>",
        ]  # fmt: skip
        yield "\n".join([text, *(table if rows else ())])


def _import_order(package: Path) -> Callable[[str], tuple[int, str, int, str]]:
    """A sort key: a folder comes after those that it imports, and before those in it."""
    floors = {within: read_house(package, within).floors for within in ("", PLUGIN)}

    def key(folder: str) -> tuple[int, str, int, str]:
        outer, _, inner = folder.partition(".")
        return (
            floors[""].get(outer, 0) if outer else 0,
            outer,
            floors[PLUGIN].get(inner, 0) if outer == PLUGIN else 0,
            inner,
        )

    return key


def _cell(module: Path) -> str:
    return first_sentence(module).replace("|", "\\|")


def first_sentence(module: Path) -> str:
    """The first sentence of a module's docstring, on one line; empty without a docstring."""
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()
