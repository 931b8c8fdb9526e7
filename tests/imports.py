"""What the package imports: from its source, and in a fresh Python that runs it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.tiny import REPO

# Runs a command of the command line, given as arguments.
RUN = """
import sys
from lorashard.cli.app import app
app(sys.argv[1:], standalone_mode=False)
"""


def source_files(package: Path) -> dict[str, Path]:
    """Every module below a package by its dotted name; "" is the package itself."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        files[name.removesuffix("__init__").removesuffix(".")] = path
    return files


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports anywhere, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(package: Path, modules: Mapping[str, Path]) -> dict[str, frozenset[str]]:
    """Module -> the package's own modules that it imports; "" is the package's face."""
    prefix = f"{package.name}."
    return {
        module: frozenset(
            _module_of(name.removeprefix(prefix), modules)
            for name in imports(path)
            if name.startswith(prefix)
        )
        for module, path in modules.items()
    }


def _module_of(name: str, modules: Mapping[str, Path]) -> str:
    """`adapter.keys.parse_key` -> adapter.keys; a name of the face -> ""."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def imported_by(code: str, *arguments: object) -> set[str]:
    """Top-level modules that are loaded once `code` has run in a fresh Python."""
    tail = "\nimport sys as s; s.stderr.write('|' + ' '.join({m.partition('.')[0] for m in s.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stderr.rpartition("|")[2].split())
