"""An adapter in several files is refused by that name, with a command that joins them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorashard.adapter.read import read_adapter
from lorashard.errors import UnsupportedAdapterError
from lorashard.storage.remote import locate
from tests.tiny import per_expert_tensors, save_config


def save_in_parts(directory: Path, stem: str = "adapter_model", count: int = 2) -> Path:
    save_config(directory)
    tensors = per_expert_tensors()
    for part in range(count):
        some = {name: tensors[name] for name in list(tensors)[part::count]}
        save_file(some, directory / f"{stem}-{part + 1:05d}-of-{count:05d}.safetensors")
    (directory / "model.safetensors.index.json").write_text("{}")
    return directory


def refusal(place: object) -> UnsupportedAdapterError:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(locate(str(place)))
    return caught.value


@pytest.mark.parametrize("stem", ["adapter_model", "model"])
def test_the_command_in_the_hint_joins_them(tmp_path: Path, stem: str) -> None:
    adapter = save_in_parts(tmp_path / "an adapter's", stem, 3)
    error = refusal(adapter)
    assert f"an adapter in 3 files ({stem}-00001-of-00003.safetensors and so on)" in error.message
    command = (error.hint or "").removeprefix("Join them: ")
    assert command != error.hint
    command = command.replace("&& python ", f"&& {sys.executable} ")
    subprocess.run(command, shell=True, check=True, timeout=100)
    joined, expected = load_file(adapter / "adapter_model.safetensors"), per_expert_tensors()
    assert joined.keys() == expected.keys()
    assert all(joined[name].equal(tensor) for name, tensor in expected.items())
    assert len(read_adapter(adapter).index.tensors) == len(expected)


def test_parts_that_are_missing_are_counted(tmp_path: Path) -> None:
    adapter = save_in_parts(tmp_path / "adapter", count=4)
    (adapter / "adapter_model-00003-of-00004.safetensors").unlink()
    error = refusal(adapter)
    assert "in 4 files (adapter_model-00001-of-00004.safetensors and so on)" in error.message
    assert "of which 3 are there" in error.message
    assert "Complete it" in (error.hint or "")


def test_elsewhere_it_is_downloaded_first(tmp_path: Path) -> None:
    adapter = save_in_parts(tmp_path / "adapter")
    error = refusal(f"file://{adapter}")
    assert "an adapter in 2 files" in error.message
    assert "Download the folder" in (error.hint or "")
