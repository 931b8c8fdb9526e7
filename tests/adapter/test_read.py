"""Adapters on disk, and the ways in which they are not adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorashard import SplitRequest
from lorashard.adapter.read import find_adapter, read_adapter, read_model_facts
from lorashard.errors import AdapterError, HeaderError, UnsupportedAdapterError
from lorashard.split.pipeline import prepared_split, write_shards
from lorashard.storage.remote import locate
from lorashard.storage.small_files import read_json
from tests.tiny import (
    fused_tensors,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_config,
    save_pickled,
)

REQUEST = SplitRequest(ep_size=2)


def test_an_adapter_is_read_without_its_tensor_data(tmp_path: Path) -> None:
    source = read_adapter(save_adapter(tmp_path / "adapter"))
    assert source.index.config.lora_rank == 2
    assert len(source.index.tensors) == 26
    assert len(source.header) == source.index.data_begin


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("adapter_config.json", "adapter_config.json: a pipe or a device, not a file."),
        ("adapter_model.safetensors", r"cannot be read \(a pipe or a device, not a file\)"),
    ],
)
@pytest.mark.parametrize("place", ["pipe", "/dev/null"])
def test_a_file_of_an_adapter_that_is_a_pipe_or_a_device_is_told(
    tmp_path: Path, name: str, error: str, place: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for directory in (tmp_path / "a", tmp_path / "b" / "named"):
        save_adapter(directory)
        (directory / name).unlink()
        (directory / name).symlink_to(tmp_path / place)
        with pytest.raises(AdapterError, match=error):
            read_adapter(tmp_path / directory.relative_to(tmp_path).parts[0])


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere does not exist"):
        read_adapter(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    weights = save_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    with pytest.raises(AdapterError, match="is a file; name its directory"):
        read_adapter(weights)


def test_a_directory_without_config_is_no_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(adapter)


def test_a_directory_without_weights_is_no_adapter(tmp_path: Path) -> None:
    save_config(tmp_path)
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)


def test_shards_without_a_notice_are_to_be_resharded(tmp_path: Path) -> None:
    save_config(tmp_path)
    (tmp_path / "lorashard.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors") as caught:
        read_adapter(tmp_path)
    assert "`lorashard reshard`" in str(caught.value.hint)


def test_weights_that_are_a_directory_are_missing(tmp_path: Path) -> None:
    save_config(tmp_path)
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)


def test_a_pickle_alone_is_refused_with_the_option_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"adapter_model\.bin") as raised:
        read_adapter(save_pickled(tmp_path / "adapter"))
    assert "allow_pickle" in str(raised.value)


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.bin").write_bytes(b"not a pickle")
    assert Path(read_adapter(adapter).weights.name).name == "adapter_model.safetensors"


def test_a_named_adapter_is_found_in_its_sub_folder(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "run" / "reviewer")
    (tmp_path / "run" / "README.md").write_text("a model card")
    assert find_adapter(tmp_path / "run") == adapter


def test_two_named_adapters_are_listed(tmp_path: Path) -> None:
    save_adapter(tmp_path / "run" / "one")
    save_adapter(tmp_path / "run" / "two")
    with pytest.raises(AdapterError, match=r"holds 2 adapters: .*one, .*two") as raised:
        find_adapter(tmp_path / "run")
    assert "Name one of them" in str(raised.value)


def test_linked_files_are_followed_as_a_hub_cache_has_them(tmp_path: Path) -> None:
    blobs = save_adapter(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    assert len(read_adapter(tmp_path / "snapshot").index.tensors) == 26


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 2000, -1])
def test_cut_off_weights_are_refused(tmp_path: Path, keep: int) -> None:
    weights = save_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(HeaderError, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path / "adapter")


def test_weights_cut_off_after_their_header_was_read_are_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with prepared_split(adapter, REQUEST) as prepared:
        weights = adapter / "adapter_model.safetensors"
        os.truncate(weights, weights.stat().st_size - 10)
        with pytest.raises(
            AdapterError, match=r"adapter_model\.safetensors: it changed while being"
        ):
            write_shards(prepared, tmp_path / "out", REQUEST, force=False, progress=lambda _: None)
    assert os.listdir(tmp_path) == ["adapter"]


def test_weights_that_vanish_after_their_header_was_read_are_named(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with prepared_split(adapter, REQUEST) as prepared:
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(
            AdapterError, match=r"adapter_model\.safetensors: it changed while being"
        ):
            write_shards(prepared, tmp_path / "out", REQUEST, force=False, progress=lambda _: None)
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1,"])
def test_json_with_a_mistake_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"map\.json: not JSON"):
        read_json(tmp_path / "map.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"map\.json: No such file"):
        read_json(tmp_path / "map.json")


def test_an_absurdly_large_config_is_not_read(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    os.truncate(adapter / "adapter_config.json", 2**40)
    with pytest.raises(AdapterError, match="larger than"):
        read_adapter(adapter)


@pytest.mark.parametrize("named", ["model", "model/config.json"])
def test_model_facts_come_from_a_directory_or_its_config(tmp_path: Path, named: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"num_experts": 4, "hidden_size": 8}')
    assert read_model_facts(tmp_path / named).num_experts == 4


def test_a_model_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        read_model_facts(tmp_path)


def other_bytes(adapter: Path, name: str) -> bytes:
    """Other content of the same length and, for the weights, with the same header."""
    content = (adapter / name).read_bytes()
    return content[:-4] + bytes(byte ^ 1 for byte in content[-4:])


def overwrite(path: Path, content: bytes) -> None:
    """As save_pretrained does: the same file, written again."""
    path.write_bytes(content)


def replace(path: Path, content: bytes) -> None:
    """Another file, with the time stamp of the old one."""
    status = path.stat()
    path.with_suffix(".new").write_bytes(content)
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_suffix(".new").rename(path)


def remove(path: Path, _content: bytes) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [overwrite, replace, remove])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("when", ["before the data", "while it is read"])
def test_an_adapter_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, change: Callable[[Path, bytes], None], name: str, when: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    os.utime(adapter / name, ns=(0, 10**18))

    before = (adapter / name).read_bytes()

    def changed() -> None:
        # Once: a second change would restore the bytes, and ext4 can reuse the first file's inode.
        if (adapter / name).exists() and (adapter / name).read_bytes() == before:
            change(adapter / name, other_bytes(adapter, name))

    with prepared_split(adapter, REQUEST) as prepared:
        if when == "before the data":
            changed()
        with pytest.raises(AdapterError, match=f"{name}: it changed while being read") as raised:
            write_shards(
                prepared, tmp_path / "out", REQUEST, force=False, progress=lambda _: changed()
            )
    assert raised.value.exit_code == 3
    assert os.listdir(tmp_path) == ["adapter"]


def test_an_adapter_that_is_cut_short_while_it_is_read_has_changed(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with prepared_split(adapter, REQUEST) as prepared:
        os.truncate(adapter / "adapter_model.safetensors", len(prepared.source.header) + 8)
        with pytest.raises(AdapterError, match="it changed while being read"):
            write_shards(prepared, tmp_path / "out", REQUEST, force=False, progress=lambda _: None)


def test_header_and_data_are_of_the_same_file(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    old = weights.read_bytes()
    with prepared_split(adapter, REQUEST) as prepared:
        replace(weights, other_bytes(adapter, weights.name))
        begin = len(prepared.source.header)
        data = bytearray(len(old) - begin)
        with (
            pytest.raises(AdapterError, match="it changed"),
            prepared.source.opened() as source,
        ):
            source.read_into(memoryview(data), begin)
    assert data == old[begin:]


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_config.json"])
def test_a_pickle_that_changes_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    os.utime(adapter / name, ns=(0, 10**18))
    request = SplitRequest(ep_size=2, allow_pickle=True)
    with prepared_split(adapter, request) as prepared:
        overwrite(adapter / name, other_bytes(adapter, name))
        with pytest.raises(AdapterError, match=f"{name}: it changed while being read"):
            write_shards(prepared, tmp_path / "out", request, force=False, progress=lambda _: None)
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("tensors", [per_expert_tensors(), fused_tensors()])
def test_tensors_that_zero3_did_not_gather_are_named_as_such(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    empty = {name: torch.empty(0) for name in tensors}
    done = run_cli("split", save_adapter(tmp_path / "adapter", empty), "--ep-size", 2)
    assert done.returncode == 3
    assert "is empty, shape [0]" in done.stderr
    assert "ZeRO-3" in done.stderr
    assert "gathered" in done.stderr


@pytest.mark.parametrize("remote", [False, True])
def test_a_trainers_folder_names_the_checkpoints_that_have_weights(
    tmp_path: Path, remote: bool
) -> None:
    save_config(tmp_path)
    for step in (20, 100, 130):
        save_adapter(tmp_path / f"checkpoint-{step}")
    save_config(tmp_path / "checkpoint-140")  # was not finished
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors") as caught:
        read_adapter(locate(tmp_path.as_uri()) if remote else tmp_path)
    assert caught.value.hint == (
        "Folders in it have weights: checkpoint-20, checkpoint-100, checkpoint-130. "
        "Name one of them."
    )


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_mlx_adapter_is_called_that(tmp_path: Path, name: str, remote: bool) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(mlx))
    with pytest.raises(UnsupportedAdapterError, match="MLX's own format") as caught:
        read_adapter(locate(adapter.as_uri()) if remote else adapter)
    assert "convert the adapter" in str(caught.value.hint)
