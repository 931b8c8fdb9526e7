"""Golden files: what `--json` prints, byte by byte. `make golden` rewrites them."""

from __future__ import annotations

import os
from pathlib import Path

from lorashard.version import __version__

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, printed: str, folder: Path) -> None:
    """`printed` is tests/golden/NAME.json, with <folder> and <version> for what differs."""
    text = printed.replace(str(folder), "<folder>").replace(f'"{__version__}"', '"<version>"')
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
