"""The PeftModel in what a trainer holds, and what cannot be published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.publish.wrapped import unwrap_peft_model
from tests.publish.fsdp_run import peft_model


@pytest.fixture
def process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_inside_ddp_and_torch_compile_is_found(process_group):
    model = peft_model()
    inside = torch.nn.parallel.DistributedDataParallel(model)
    assert unwrap_peft_model(model, "default") is model
    assert unwrap_peft_model(inside, "default") is model
    assert unwrap_peft_model(torch.compile(model), "default") is model
    assert unwrap_peft_model(torch.compile(inside), "default") is model


def test_a_model_without_an_adapter_is_refused():
    base = peft_model().base_model.model
    with pytest.raises(AdapterError, match=r"^Qwen3MoeForCausalLM is not a PeftModel"):
        unwrap_peft_model(base, "default")
    with pytest.raises(AdapterError, match=r"^OptimizedModule is not a PeftModel"):
        unwrap_peft_model(torch.compile(base), "default")
    with pytest.raises(AdapterError, match="no model"):
        unwrap_peft_model(None, "default")


def test_an_adapter_that_the_model_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(AdapterError, match=r"no adapter 'policy'\.\n.*'default'"):
        unwrap_peft_model(peft_model(), "policy")


def test_the_first_version_of_fsdp_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        peft_model(), device_id=torch.device("cpu"), use_orig_params=True
    )
    with pytest.raises(UnsupportedAdapterError, match="FSDP's first version"):
        unwrap_peft_model(model, "default")


def test_zero_3_is_refused():
    model = peft_model()
    next(model.parameters()).ds_id = 0  # DeepSpeed's mark; its ZeRO-3 needs a GPU
    with pytest.raises(UnsupportedAdapterError, match="ZeRO-3"):
        unwrap_peft_model(model, "default")
