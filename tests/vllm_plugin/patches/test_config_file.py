"""What vLLM would wait for, or read to no end, is refused before; tests/fuzz runs it inside vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorashard.errors import AdapterError
from lorashard.vllm_plugin.patches.config_file import refuse_odd_config
from tests.tiny import save_adapter

CONFIG = "adapter_config.json"


def request(path: object) -> SimpleNamespace:
    return SimpleNamespace(lora_path=str(path))


def test_a_configuration_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CONFIG)
    with pytest.raises(AdapterError, match=rf"{CONFIG}: not a file"):
        refuse_odd_config(request(tmp_path))


@pytest.mark.parametrize("target", ["/dev/zero", "."])
def test_a_configuration_that_leads_to_something_odd_is_refused(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / CONFIG).symlink_to(target)
    with pytest.raises(AdapterError, match="not a file"):
        refuse_odd_config(request(tmp_path))


def test_a_configuration_larger_than_any_is_refused(tmp_path: Path) -> None:
    with (tmp_path / CONFIG).open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(AdapterError, match="larger than"):
        refuse_odd_config(request(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "owner/name", "~no-such-user-here/x", "a\0b"])
def test_what_is_not_there_is_left_to_vllm(name: str) -> None:
    refuse_odd_config(request(name))


def test_a_linked_configuration_is_read(tmp_path: Path) -> None:
    store = save_adapter(tmp_path / "store")
    (tmp_path / CONFIG).symlink_to(store / CONFIG)
    refuse_odd_config(request(tmp_path))
