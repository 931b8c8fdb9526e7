"""adapter_model.bin gives the same shards, and never runs code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorashard import SplitRequest, merge_shards, split_adapter, verify_shards
from lorashard.adapter.pickled import PickledTensors
from lorashard.errors import AdapterError, HeaderError, UnsupportedAdapterError
from lorashard.shards.replan import source_was_pickled
from tests.tiny import (
    FUSED_CONFIG,
    contents,
    fused_tensors,
    per_expert_tensors,
    save_adapter,
    save_pickled,
)

REQUEST = SplitRequest(ep_size=2, allow_pickle=True)


class Payload:
    """What runs `function(*arguments)` when it is unpickled without care."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> object:
        return self.reduced


def test_a_pickle_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="pickle"):
        split_adapter(save_pickled(tmp_path / "adapter"), tmp_path / "out", SplitRequest(ep_size=2))
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_a_pickle_gives_the_same_shards_as_safetensors(tmp_path: Path, form: str) -> None:
    tensors = per_expert_tensors() if form == "per_expert" else fused_tensors()
    config = {} if form == "per_expert" else FUSED_CONFIG
    split_adapter(save_pickled(tmp_path / "bin", tensors, **config), tmp_path / "one", REQUEST)
    split_adapter(save_adapter(tmp_path / "safe", tensors, **config), tmp_path / "two", REQUEST)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("lorashard.json") != two.pop("lorashard.json"), "it tells of the pickle"
    assert one == two


def test_shards_of_a_pickle_are_proven_against_it(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "out", REQUEST)
    assert verify_shards(tmp_path / "out", against=adapter, allow_pickle=True) == ()
    with pytest.raises(UnsupportedAdapterError):
        verify_shards(tmp_path / "out", against=adapter)


def test_merge_gives_the_tensors_of_a_pickle_as_safetensors(tmp_path: Path) -> None:
    split_adapter(save_pickled(tmp_path / "adapter"), tmp_path / "out", REQUEST)
    manifest = merge_shards(tmp_path / "out", tmp_path / "merged")
    assert source_was_pickled(manifest)
    merged = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    expected = per_expert_tensors()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_parameters_views_and_tied_tensors_are_plain_tensors(tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    names = list(tensors)
    tensors[names[0]] = torch.nn.Parameter(tensors[names[0]])
    tensors[names[2]] = tensors[names[2]].t().contiguous().t()
    same = [name for name in names if tensors[name].shape == tensors[names[-1]].shape]
    tensors[same[0]] = tensors[same[1]]
    adapter = save_pickled(tmp_path / "adapter", tensors)
    split_adapter(adapter, tmp_path / "out", REQUEST)
    assert verify_shards(tmp_path / "out", against=adapter, allow_pickle=True) == ()


@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_a_payload_is_refused_and_not_run(tmp_path: Path, function: object) -> None:
    marker = tmp_path / "marker"
    code = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    content = {**per_expert_tensors(), "x": Payload(function, code)}
    adapter = save_pickled(tmp_path / "adapter", content)
    with pytest.raises(AdapterError, match="cannot be read as plain tensors"):
        split_adapter(adapter, tmp_path / "out", REQUEST)
    assert sorted(os.listdir(tmp_path)) == ["adapter"], "no marker, no shards"


def test_the_message_does_not_recommend_to_load_a_payload_all_the_same(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter", {"x": Payload(eval, "1")})
    with pytest.raises(AdapterError) as raised:
        split_adapter(adapter, tmp_path / "out", REQUEST)
    assert "will likely succeed" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [[], [torch.zeros(2)], torch.zeros(2), {"state_dict": {}}, {"a": 1}]
)
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    adapter = save_pickled(tmp_path / "adapter", content)
    with pytest.raises(AdapterError):
        split_adapter(adapter, tmp_path / "out", REQUEST)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(40)])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises(AdapterError):
        split_adapter(adapter, tmp_path / "out", REQUEST)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02u."])
def test_damaged_opcodes_are_refused(tmp_path: Path, content: bytes) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises(AdapterError):
        split_adapter(adapter, tmp_path / "out", REQUEST)


@pytest.mark.parametrize(
    "odd",
    [
        {1: torch.zeros(2, 2)},
        {"s": torch.zeros(2, 8).to_sparse()},
        {"m": torch.zeros(2, 8, device="meta")},
    ],
    ids=["a number as name", "sparse", "no data"],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path: Path, odd: dict) -> None:
    adapter = save_pickled(tmp_path / "adapter", {**per_expert_tensors(), **odd})
    with pytest.raises(AdapterError):
        split_adapter(adapter, tmp_path / "out", REQUEST)


def test_a_pipe_in_place_of_the_pickle_is_refused_at_once(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    (adapter / "adapter_model.bin").unlink()
    os.mkfifo(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pipe or a device, not a file"):
        split_adapter(adapter, tmp_path / "out", REQUEST)


def test_no_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    split_adapter(save_pickled(tmp_path / "adapter"), tmp_path / "out", REQUEST)
    assert not (tmp_path / "missing").exists()


def test_any_part_of_it_is_that_of_the_safetensors_file(tmp_path: Path) -> None:
    tensors = per_expert_tensors() | {
        "a.step": torch.tensor(7), "a.mask": torch.ones(3, dtype=torch.bool),
        "a.empty": torch.zeros(0, 4), "a.half": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "a.u16": torch.ones(2, dtype=torch.uint16),
    }  # fmt: skip
    source = PickledTensors(save_pickled(tmp_path / "bin", tensors) / "adapter_model.bin")
    expected = save_adapter(tmp_path / "safe", tensors) / "adapter_model.safetensors"
    whole = expected.read_bytes()
    assert source.size_bytes == len(whole)
    assert source.read(0, len(whole)) == whole
    for begin in range(0, len(whole), 61):
        for size in (1, 100, 777):
            end = min(begin + size, len(whole))
            assert source.read(begin, end) == whole[begin:end]
    with pytest.raises(HeaderError, match="end at byte"):
        source.read(len(whole) - 1, len(whole) + 1)


@pytest.mark.parametrize("shape", [(2, 10**9), (2, 10**13), (3, 2)])
def test_a_tensor_larger_than_what_is_stored_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = per_expert_tensors()
    name = next(iter(tensors))
    tensors[name] = torch.zeros(1).expand(shape)
    adapter = save_pickled(tmp_path / "adapter", tensors)
    with pytest.raises(AdapterError, match="larger than the 4 bytes stored") as raised:
        split_adapter(adapter, tmp_path / "out", REQUEST)
    assert name in str(raised.value)
