"""What `import lorashard` shows to somebody who explores it."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path

import lorashard
from lorashard import SplitRequest, open_shards, split_adapter
from tests.tiny import REPO, save_adapter

LOOK = """
import sys, lorashard
assert set(lorashard.__all__) < set(dir(lorashard)), dir(lorashard)
assert not any(name.startswith("_") and name != "__version__" for name in dir(lorashard))
assert issubclass(lorashard.errors.ShardError, lorashard.LorashardError)
assert not {"torch", "rich", "typer", "numpy"} & set(sys.modules)
"""


def test_completion_shows_the_api_and_imports_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", LOOK], cwd=REPO, check=True)


def test_help_shows_the_functions_with_their_arguments() -> None:
    shown = pydoc.plain(pydoc.render_doc(lorashard))
    for name in set(lorashard.__all__) - {"__version__"}:
        assert name in shown
    assert "split_adapter(adapter: " in shown


def test_an_opened_directory_is_shown_in_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_adapter(save_adapter(tmp_path / "adapter"), out, SplitRequest(ep_size=2))
    opened = open_shards(out)
    assert repr(opened) == (
        f"ShardDirectory({str(out)!r}, Manifest(4 experts in 1 modules, linear on 2 ranks))"
    )
    rank = opened.rank(0)
    assert repr(rank) == f"TensorFile({str(rank.path)!r}, {len(rank.entries)} tensors)"
