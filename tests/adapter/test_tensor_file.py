"""Tensors in memory as the bytes of the file that they would make."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from lorashard.adapter.tensor_file import TensorFile
from lorashard.errors import AdapterError, HeaderError
from lorashard.storage.safetensors_file import read_header


def tensors() -> dict[str, torch.Tensor]:
    numbers = torch.arange(24, dtype=torch.float32)
    return {
        "b": numbers.view(4, 6),
        "a": numbers.to(torch.bfloat16).view(2, 3, 4),
        "empty": torch.empty(0, 5),
        "transposed": numbers.view(4, 6).t(),
        "strided": numbers[::3],
        "integers": torch.arange(3),
    }


def test_it_is_a_file_with_the_same_tensors() -> None:
    file = TensorFile("memory", tensors())
    read = load(file.read(0, file.size_bytes))
    assert read.keys() == tensors().keys()
    assert all(read[name].equal(tensor) for name, tensor in tensors().items())


def test_it_has_the_header_that_safetensors_would_write(tmp_path: Path) -> None:
    plain = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(plain, tmp_path / "file", {"format": "pt"})
    _, written = read_header(tmp_path / "file")
    _, made = read_header(TensorFile("memory", plain))
    shapes = {entry.name: (entry.dtype, entry.shape) for entry in written.tensors}
    assert {entry.name: (entry.dtype, entry.shape) for entry in made.tensors} == shapes


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_any_part_of_it_can_be_read(step: int) -> None:
    file = TensorFile("memory", tensors())
    whole = file.read(0, file.size_bytes)
    parts = [
        file.read(begin, min(begin + step, file.size_bytes))
        for begin in range(0, file.size_bytes, step)
    ]
    assert b"".join(parts) == whole


def test_the_tensors_stay_as_they_are() -> None:
    given = tensors()
    needs_grad = given["b"].clone().requires_grad_()
    file = TensorFile("memory", given | {"b": needs_grad})
    file.read(0, file.size_bytes)
    assert not given["transposed"].is_contiguous()
    assert all(tensor.equal(tensors()[name]) for name, tensor in given.items())
    assert needs_grad.requires_grad


def test_what_is_queued_on_a_gpu_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no GPU here; tests/gpu/tensor_order.py does the same on one.
    waited: list[torch.device] = []

    def current_stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    gpu = torch.device("cuda", 1)
    there: Any = SimpleNamespace(dtype=torch.float32, shape=(2,), device=gpu)
    there.detach = lambda: there
    TensorFile("memory", {"a": there, "b": there, "c": torch.zeros(2)})
    assert waited == [gpu]


def test_what_is_beyond_its_end_is_an_error() -> None:
    file = TensorFile("memory", tensors())
    with pytest.raises(HeaderError, match="its tensors end at byte"):
        file.read(0, file.size_bytes + 1)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_that_no_adapter_has_is_an_error() -> None:
    with pytest.raises(AdapterError, match="'q' has dtype complex32"):
        TensorFile("memory", {"q": torch.zeros(2, dtype=torch.complex32)})
