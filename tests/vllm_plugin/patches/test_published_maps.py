"""The file with an engine's expert map. That `split` takes it: test_rebalancing_conformance.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.patches.published_maps import publish_maps

NAME = "model.layers.3.mlp.experts"


def loader(ep_rank: int = 0) -> Any:
    return SimpleNamespace(ep_rank=ep_rank, ep_size=2, maps=ExpertMaps({NAME: (1, 0)}))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.lorashard")


def test_the_map_is_written_whole_and_the_log_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(settings.EXPERT_MAPS, str(tmp_path / "maps"))
    for _ in range(2):
        publish_maps(loader(), "experts moved")
    (path,) = (tmp_path / "maps").iterdir()
    assert json.loads(path.read_text())["layers"] == {"3": {"ranks": [[1], [0]]}}
    assert f"experts moved; the map for `lorashard split --expert-map` is {path}" in caplog.text


def test_without_a_directory_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(settings.EXPERT_MAPS, raising=False)
    publish_maps(loader(), "experts moved")
    assert [record.getMessage() for record in caplog.records] == ["lorashard: experts moved"]


def test_other_ranks_say_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(settings.EXPERT_MAPS, str(tmp_path))
    publish_maps(loader(ep_rank=1), "experts moved")
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(settings.EXPERT_MAPS, str(tmp_path / "file"))
    publish_maps(loader(), "experts moved")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot write where the experts are" in record.getMessage()
