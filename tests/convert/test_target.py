"""What the base model is like is stated by someone, or conversion is refused; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorashard import LayoutOptions, SplitRequest, convert_shards, split_adapter
from tests.conversions import PEFT_LAYOUTS, UNNAMED, refused
from tests.tiny import MODULE, fused_tensors, per_expert_tensors, save_adapter, save_fused


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_the_order_of_gate_and_up_is_not_guessed(tmp_path: Path, layout: str) -> None:
    source = fused_tensors() if layout == "per_expert" else per_expert_tensors()
    adapter = save_adapter(tmp_path / "adapter", source, **UNNAMED)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    message = refused(tmp_path / "shards", layout)
    assert message.startswith(f"{MODULE}: ")
    assert "--model" in message
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 4}')
    convert_shards(tmp_path / "shards", tmp_path / "out", layout, model=tmp_path / "config.json")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_what_the_split_was_told_is_known(tmp_path: Path, layout: str) -> None:
    source = fused_tensors() if layout == "per_expert" else per_expert_tensors()
    adapter = save_adapter(tmp_path / "adapter", source, **UNNAMED)
    options = LayoutOptions(gate_up="concatenated")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2, options=options))
    convert_shards(tmp_path / "shards", tmp_path / "out", layout)  # type: ignore[arg-type]


def test_which_way_round_a_feed_forward_lies_is_not_guessed(tmp_path: Path) -> None:
    tensors = {
        name.replace(".mlp.", ".feed_forward."): t for name, t in per_expert_tensors().items()
    }
    adapter = save_adapter(tmp_path / "adapter", tensors, **UNNAMED)
    options = LayoutOptions(gate_up="concatenated")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2, options=options))
    assert "--orientation" in refused(tmp_path / "shards", "fused")
    convert_shards(tmp_path / "shards", tmp_path / "llama", "fused", orientation="transposed")
    tensors = load_file(tmp_path / "llama" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.feed_forward.experts.base_layer.lora_A.weight"
    assert tensors[key].shape == (4 * 4, 12)  # [E * 2r, 2I]


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_a_model_without_gates_contradicts_them(tmp_path: Path, layout: str) -> None:
    source = save_fused if layout == "per_expert" else save_adapter
    split_adapter(source(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h", "num_experts": 4}')
    assert "no gate" in refused(tmp_path / "shards", layout, model=tmp_path / "config.json")
