"""verl's FSDP2 workers: `save_sharded` writes what verl collects, as shards and without collecting it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter, verify_shards
from tests.publish.ranks import run_ranks
from tests.tiny import REPO
from tests.vllm_plugin.beside_packages import INSTALLED

RUN = REPO / "tests" / "publish" / "verl_run.py"
WORLD = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (INSTALLED / "verl").is_dir():
        if os.environ.get("LORASHARD_REQUIRE_ALL", "") not in ("", "0"):
            pytest.fail("verl is not there: make .venv/.beside")
        pytest.skip("make .venv/.beside")
    folder = tmp_path_factory.mktemp("verl")
    run_ranks(RUN, WORLD, folder)
    return folder


@pytest.mark.parametrize("layered", [False, True])
def test_the_worker_of_the_page_writes_what_verl_collects(run: Path, layered: bool) -> None:
    gathered = run / f"gathered-{layered}"
    config = (run / "sharded" / "adapter_config.json").read_bytes()
    (gathered / "adapter_config.json").write_bytes(config)
    out = run / f"split-{layered}"
    split_adapter(gathered, out, SplitRequest(3, model=run / "base"))
    saved = {path.name: path.read_bytes() for path in (run / "sharded").iterdir()}
    assert saved == {path.name: path.read_bytes() for path in out.iterdir()}
    verify_shards(run / "sharded", against=gathered)
