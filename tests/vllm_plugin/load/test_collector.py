"""The garbage collector is as it was after a load, however the load ends."""

from __future__ import annotations

import gc

import pytest

from lorashard.vllm_plugin.load.collector import paused_collection


def test_it_is_paused_within_the_block_and_runs_again_after_it() -> None:
    assert gc.isenabled()
    with paused_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_runs_again_after_a_failure() -> None:
    with pytest.raises(ValueError, match="refused"), paused_collection():
        raise ValueError("refused")
    assert gc.isenabled()


def test_it_stays_off_where_the_server_has_turned_it_off() -> None:
    gc.disable()
    try:
        with paused_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
