"""An adapter, and the shard directory that the command line makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import run_cli, save_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


@pytest.fixture
def shards(adapter: Path) -> Path:
    run_cli("split", adapter, "--ep-size", 2)
    return adapter.with_name("adapter-ep2")
