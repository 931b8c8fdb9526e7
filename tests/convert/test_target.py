"""What the base model is like is stated by someone, or conversion is refused; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorashard import LayoutOptions, SplitRequest, convert_shards, split_adapter
from lorashard.adapter.base_model import ModelFacts, parse_model_config, uses_w_names
from lorashard.convert.target import PeftTarget, describe_target
from tests.conversions import PEFT_LAYOUTS, UNNAMED, refused
from tests.layouts import built
from tests.strategies import index_of, layout_of
from tests.tiny import MODULE, fused_tensors, per_expert_tensors, save_adapter, save_fused


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_the_order_of_gate_and_up_is_not_guessed(tmp_path: Path, layout: str) -> None:
    source = fused_tensors() if layout == "per_expert" else per_expert_tensors()
    adapter = save_adapter(tmp_path / "adapter", source, **UNNAMED)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    message = refused(tmp_path / "shards", layout)
    assert message.startswith(f"{MODULE}: ")
    assert "`model=MODEL_DIR`" in message
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 4}')
    convert_shards(tmp_path / "shards", tmp_path / "out", layout, model=tmp_path / "config.json")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["concatenated", "interleaved"])
def test_an_order_that_only_the_manifest_claims_is_not_believed(tmp_path: Path, order: str) -> None:
    """As an earlier release recorded it for a path, or as a changed manifest has it."""
    adapter = save_fused(tmp_path / "adapter", base_model_name_or_path="/ckpt/gpt-oss-step-400")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    path = tmp_path / "shards" / "lorashard.json"
    document = json.loads(path.read_text())
    del document["blake3"]  # an earlier release wrote none
    document["options"]["gate_up_known"] = True
    document["modules"][MODULE]["gate_up"] = order
    path.write_text(json.dumps(document))
    assert "`model=MODEL_DIR`" in refused(tmp_path / "shards", "per_expert")


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
    assert "`orientation`" in refused(tmp_path / "shards", "fused")
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


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_local_path_leaves_the_order_open(layout: str) -> None:
    assert described(layout, base_model="/ckpt/global_step_400/huggingface").gate_up is None
    assert described(layout, base_model="/ckpt/gpt-oss-distill").gate_up is None


def described(layout: str, facts: ModelFacts | None = None, **fields: Any) -> PeftTarget:
    """The target for an adapter of this base model, with these options of the split."""
    adapter = built(config={"base_model_name_or_path": fields.pop("base_model", None)})
    return describe_target(
        layout_of(adapter), index_of(adapter).config, layout,
        options=LayoutOptions(**fields), facts=facts, modules_with_equal_inputs=frozenset(),
        stack_dtypes={},
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_model_s_config_outweighs_the_options_and_those_the_name() -> None:
    facts = parse_model_config({"model_type": "gpt_oss", "num_experts": 4}, "config.json")
    stated = described("fused", facts, gate_up="concatenated", base_model="Qwen/Qwen3")
    assert (stated.gate_up, stated.gate_up_stated) == ("interleaved", True)
    by_option = described("fused", gate_up="concatenated", base_model="openai/gpt-oss")
    assert (by_option.gate_up, by_option.gate_up_stated) == ("concatenated", True)
    by_name = described("fused", base_model="openai/gpt-oss-20b")
    assert (by_name.gate_up, by_name.gate_up_stated) == ("interleaved", False)
    assert described("fused").gate_up is None


@pytest.mark.parametrize(
    ("layout", "options", "orientation"),
    [
        ("fused", {"base_model": "meta/Llama-4-Scout"}, "transposed"),
        ("fused", {"base_model": "meta/Llama-4-Scout", "orientation": "standard"}, "standard"),
        ("fused", {"base_model": "some/qwen3-moe"}, "standard"),
        ("per_expert", {"orientation": "transposed"}, "standard"),
    ],
)
def test_the_orientation_is_peft_s_for_the_base_model(
    layout: str, options: dict[str, Any], orientation: str
) -> None:
    assert described(layout, **options).orientation == orientation


def test_what_tells_the_family_best_names_the_experts() -> None:
    """A folder called mixtral does not make a Qwen's projections w1, w3 and w2."""
    facts = parse_model_config({"model_type": "mixtral", "num_experts": 4}, "config.json")
    assert described("per_expert", facts, base_model="me/mine").model_names == "mixtral"
    qwen = parse_model_config({"model_type": "qwen3_moe", "num_experts": 4}, "config.json")
    named = described("per_expert", qwen, base_model="/mixtral-runs/qwen")
    assert not uses_w_names(named.model_names)
    assert described("per_expert").model_names == ""
