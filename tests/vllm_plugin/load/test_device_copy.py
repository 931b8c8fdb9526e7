"""A copy of a region that is being filled: which bytes of it are copied, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lorashard.vllm_plugin.load import device_copy
from lorashard.vllm_plugin.load.device_copy import DeviceCopy, ExpertsOnDevice, begin_copy

CPU = torch.device("cpu")


@pytest.mark.parametrize("piece", [device_copy.PIECE_BYTES, 3, 1])
def test_each_byte_is_copied_once_from_front_to_back(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(device_copy, "PIECE_BYTES", piece)
    region = torch.arange(1, 11, dtype=torch.uint8)
    copy = DeviceCopy(region, CPU)
    copy.bytes.zero_()
    for end in (0, 4, 3, 4, 10):
        copy.copy_up_to(end)
        if end == 4:
            region[:4] = 99  # what comes after the copy is not seen
    copy.wait()
    assert copy.bytes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_host_memory_is_not_copied_to_itself() -> None:
    assert begin_copy(torch.zeros(8, dtype=torch.uint8), CPU) is None


def test_a_model_has_the_experts_of_the_device_in_between_only() -> None:
    model = SimpleNamespace(loras={"experts": "host", "dense": "host"})
    other = SimpleNamespace(loras={"experts": "other"})
    experts = ExpertsOnDevice(model, {"experts": "device"})
    experts.enter(other)
    experts.enter(model)
    assert model.loras == {"experts": "device", "dense": "host"}
    assert other.loras == {"experts": "other"}
    experts.leave()
    experts.enter(model)  # the device's memory is not kept
    assert model.loras == {"experts": "host", "dense": "host"}
