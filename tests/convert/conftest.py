"""Shards to convert, and nothing left behind by any of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from tests.tiny import save_adapter


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Per-expert shards on two ranks."""
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def _nothing_half_done(tmp_path: Path) -> Iterator[None]:
    yield
    assert [name for name in os.listdir(tmp_path) if "lorashard" in name] == []
