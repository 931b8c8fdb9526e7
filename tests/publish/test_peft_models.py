"""A PEFT model's adapter, whole or sharded by FSDP2: the shards that `split` writes of the saved one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter, verify_shards
from lorashard.publish.peft_models import save_sharded
from tests.publish.ranks import run_ranks
from tests.tiny import REPO

RUN = REPO / "tests" / "publish" / "fsdp_run.py"


def split_of_saved(folder: Path) -> dict[str, bytes]:
    """The files that `split` writes of what PEFT has saved."""
    gathered = folder / "gathered"
    # PEFT writes sets in any order, and with inference_mode as it is in training.
    mine = json.loads((folder / "sharded" / "adapter_config.json").read_text())
    theirs = json.loads((gathered / "adapter_config.json").read_text())
    for key, value in theirs.items():
        if key not in ("inference_mode", "auto_mapping", "base_model_name_or_path"):
            assert (sorted(value) if isinstance(value, list) else value) == mine[key], key
    config = (folder / "sharded" / "adapter_config.json").read_bytes()
    (gathered / "adapter_config.json").write_bytes(config)
    split_adapter(gathered, folder / "split", SplitRequest(3, model=folder / "base"))
    return {path.name: path.read_bytes() for path in (folder / "split").iterdir()}


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_that_fsdp2_shards_is_saved_as_if_it_had_been_gathered(
    tmp_path: Path, world: int
) -> None:
    run_ranks(RUN, world, tmp_path)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert saved == split_of_saved(tmp_path)
    verify_shards(tmp_path / "sharded", against=tmp_path / "gathered")
    for rank in range(world):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["modules"] == 2
        assert told["sharded"] == told["all"] > 0


def test_a_model_in_one_process(tmp_path: Path) -> None:
    from tests.publish.fsdp_run import peft_model

    model = peft_model()
    save_sharded(model, tmp_path / "sharded", ep_size=3)
    model.save_pretrained(tmp_path / "gathered")
    model.base_model.model.config.save_pretrained(tmp_path / "base")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert saved == split_of_saved(tmp_path)
