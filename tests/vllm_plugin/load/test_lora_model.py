"""Tensors as vLLM's LoRAModel holds them; whole models: test_loader.py, test_loading_conformance.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorashard.dtypes import TORCH_DTYPES
from lorashard.errors import LayoutError
from lorashard.header import build_header
from lorashard.vllm_plugin.load.lora_model import safetensors_dtype, tensor_in


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_is_a_view_of_its_bytes_in_the_region(dtype: torch.dtype) -> None:
    values = torch.arange(6).to(dtype).view(2, 3)
    _, entries = build_header(
        [("before", "U8", (3,)), ("it", safetensors_dtype(dtype), (2, 3))], {"format": "pt"}
    )
    entry = next(entry for entry in entries if entry.name == "it")
    begin = min(entry.begin for entry in entries)
    region = np.zeros(64, dtype=np.uint8)
    at = entry.begin - begin
    data = values.view(torch.uint8).numpy().reshape(-1)
    region[at : at + data.size] = data
    tensor = tensor_in(region, entry, begin)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, values)
    region[:] = 0
    assert not tensor.any()


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_goes_to_torch_and_back(name: str) -> None:
    assert safetensors_dtype(getattr(torch, TORCH_DTYPES[name])) == name


@pytest.mark.parametrize("dtype", ["I64", "BOOL"])
def test_a_tensor_that_is_no_float_is_refused_by_name(dtype: str) -> None:
    _, (entry,) = build_header([("score.step", dtype, (1,))], {"format": "pt"})
    with pytest.raises(LayoutError, match=f"score.step has dtype {dtype}"):
        tensor_in(np.zeros(8, dtype=np.uint8), entry, entry.begin)
