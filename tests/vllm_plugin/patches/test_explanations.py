"""What is added to vLLM's refusal of an adapter that it has not read. vLLM is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.adapter.options import LayoutOptions
from lorashard.vllm_plugin.patches.explanations import explain_refusal
from tests.adapters import Spec, build

SAID = "LoRA rank for `x` in `rank_pattern` must be a positive integer, got 0."


def loader(ep_size: int = 2, num_experts: int = 4) -> Any:
    options = LayoutOptions(num_experts=num_experts)
    return SimpleNamespace(ep_size=ep_size, layout_options=lambda: options)


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return build(Spec("L1")).write(tmp_path / "adapter")


def test_an_adapter_that_is_fine_has_a_way_out_only_for_an_r_of_0(adapter: Path) -> None:
    explained = explain_refusal(adapter, SAID, loader())
    assert explained is not None
    assert explained.startswith("modules with r=0 are not trained. Run ")
    said = "LoRA rank 64 is greater than max_lora_rank 16."
    assert explain_refusal(adapter, said, loader()) is None


def test_no_way_out_is_named_that_would_end_in_a_refusal(adapter: Path) -> None:
    explained = explain_refusal(adapter, SAID, loader(num_experts=3))
    assert explained is not None
    assert "Run" not in explained
    assert "expert 3" in explained
    assert "3 experts" in explained


def test_a_configuration_is_judged_without_reading_a_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"not a pickle")
    assert explain_refusal(adapter, SAID, loader()) is None
    edit_config(adapter, use_dora=True)
    explained = explain_refusal(adapter, "vLLM does not yet support DoRA.", loader())
    assert explained is not None
    assert "DoRA (use_dora) is not supported" in explained


def test_what_vllm_s_own_loader_takes_is_not_explained(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, use_dora=True)
    for none in (None, loader(ep_size=1)):
        assert explain_refusal(adapter, SAID, none) is None
    assert explain_refusal(tmp_path / "org" / "name-on-the-hub", SAID, loader()) is None


def test_explaining_never_raises(adapter: Path) -> None:
    def layout_options() -> LayoutOptions:
        raise RuntimeError("a fault of lorashard's own")

    faulty: Any = SimpleNamespace(ep_size=2, layout_options=layout_options)
    assert explain_refusal(adapter, SAID, faulty) is None
