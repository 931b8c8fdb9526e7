"""What a base model's config.json or its name says of its experts; what neither says is not guessed."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.adapter.base_model import (
    fused_orientation,
    fused_orientation_by_name,
    gate_up_by_name,
    gate_up_of,
    has_fused_experts,
    merge_facts,
    parse_model_config,
    telling_name,
    uses_w_names,
)
from lorashard.adapter.options import LayoutOptions
from lorashard.errors import AdapterError

QWEN = {"model_type": "qwen3_moe", "num_experts": 128, "hidden_size": 2048,
        "moe_intermediate_size": 768}  # fmt: skip


def test_a_config_says_how_many_experts_of_which_size() -> None:
    facts = parse_model_config(QWEN, "config.json")
    assert (facts.num_experts, facts.hidden_size, facts.intermediate_size) == (128, 2048, 768)
    assert (facts.model_type, facts.gate_up) == ("qwen3_moe", "concatenated")


@pytest.mark.parametrize(
    "key", ["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"]
)
@pytest.mark.parametrize("count", [8, [8, 8, 8]])
def test_the_count_has_many_names_and_may_be_one_for_each_layer(key: str, count: Any) -> None:
    assert parse_model_config({key: count}, "config.json").num_experts == 8


@pytest.mark.parametrize("nested", ["text_config", "thinker_config", "llm_config"])
def test_a_multimodal_model_s_experts_are_those_of_its_text_model(nested: str) -> None:
    config = {"model_type": "outer", nested: {"text_config": QWEN} if nested[1] == "h" else QWEN}
    assert parse_model_config(config, "config.json").model_type == "qwen3_moe"


def test_experts_can_be_narrower_than_the_model() -> None:
    config = {"num_experts": 8, "hidden_size": 2048, "moe_latent_size": 1024}
    assert parse_model_config(config, "config.json").hidden_size == 1024


@pytest.mark.parametrize(
    "config", [{}, {"num_experts": 0}, {"num_experts": [8, 4]}, {"num_experts": "8"}]
)
def test_a_config_without_one_count_of_experts_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=r"config\.json: no expert count"):
        parse_model_config(config, "config.json")


@pytest.mark.parametrize(
    ("model_type", "gate_up", "orientation"),
    [
        ("gpt_oss", "interleaved", "standard"), ("nemotron_h", "none", "standard"),
        ("llama4_text", "concatenated", "transposed"), ("anything", "concatenated", "standard"),
    ],
)  # fmt: skip
def test_a_model_type_decides_how_fused_experts_are_stored(
    model_type: str, gate_up: str, orientation: str
) -> None:
    assert (gate_up_of(model_type), fused_orientation(model_type)) == (gate_up, orientation)


@pytest.mark.parametrize(
    ("names", "gate_up", "orientation"),
    [
        (("openai/gpt-oss-20b", None), "interleaved", "standard"),
        (("/models/mine", "GptOssForCausalLM"), "interleaved", "standard"),
        (("meta/Llama-4-Scout", None), "concatenated", "transposed"),
        (("Qwen/Qwen3-30B-A3B", None), "concatenated", "standard"),
        (("/models/mine", "SomeForCausalLM"), "concatenated", "standard"),
        (("/models/mine", None), None, None),
        ((None, None), None, None),
        (("/mnt/ckpt/sft-run7/global_step_400/huggingface", None), None, None),
        (("/models/gpt-oss-distill", None), None, None),
        (("/models/Llama-4-Scout", None), None, None),
        (("ckpt/global_step_400", None), None, None),
        (("someone/global_step_400", None), None, None),
        (("checkpoints/qwen3-sft", None), None, None),
        (("./models/qwen3", None), None, None),
        (("qwen3", None), None, None),
        (("philipp/moe", None), None, None),
        (("someone/philipp-moe", None), None, None),
        (("someone/gpt-oss-distill", None), None, None),
        (("someone/qwen3-like-gpt-oss", None), None, None),
        (("stepfun-ai/Step-3.5-Flash", None), "concatenated", "standard"),
        (("/models/qwen3", "GptOssForCausalLM"), "interleaved", "standard"),
        (("openai/gpt-oss-20b", "Qwen3MoeForCausalLM"), "concatenated", "standard"),
        (("/models/mine", "AutoModelForCausalLM"), None, None),
        (("/models/mine", "FullyShardedDataParallel"), None, None),
        (("/models/mine", "OptimizedModule"), None, None),
    ],
    ids=str,
)
def test_a_name_decides_only_where_it_is_known(
    names: tuple[str | None, str | None], gate_up: str | None, orientation: str | None
) -> None:
    assert gate_up_by_name(*names) == gate_up
    assert fused_orientation_by_name(*names) == orientation


def test_names_tell_what_transformers_4_calls_the_experts() -> None:
    assert uses_w_names("mistralai/Mixtral-8x7B MixtralForCausalLM")
    assert uses_w_names("microsoft/Phi-3.5-MoE-instruct")
    assert not uses_w_names("qwen3_moe")
    assert has_fused_experts("openai/GPT-OSS-120b")
    assert not has_fused_experts("mixtral")
    assert has_fused_experts("rhymes-ai/Aria AriaForConditionalGeneration")
    assert has_fused_experts("ibm-granite/granite-3.0-3b-a800m GraniteMoeForCausalLM granitemoe")


@pytest.mark.parametrize(
    "names",
    ["/data/mixtral-runs/qwen3", "minimax-user/glm", "granite/qwen3-moe/", "me/variant-7b qwen3_moe",
     "arianna/olmoe", "me/arianna-7b", "/home/llama4/step_400/model Qwen3MoeForCausalLM"],
)  # fmt: skip
def test_folders_and_parts_of_words_tell_nothing(names: str) -> None:
    assert not uses_w_names(names)
    assert not has_fused_experts(names)


def test_options_outweigh_the_model_s_config_except_for_the_count() -> None:
    facts = parse_model_config(QWEN, "config.json")
    merged = merge_facts(LayoutOptions(hidden_size=7, gate_up="interleaved"), facts)
    assert merged == LayoutOptions(128, 7, 768, "interleaved")
    assert merge_facts(LayoutOptions(num_experts=5), None) == LayoutOptions(num_experts=5)
    with pytest.raises(AdapterError, match="`num_experts` is 5, the model has 128"):
        merge_facts(LayoutOptions(num_experts=5), facts)


@pytest.mark.parametrize(
    ("known", "name"),
    [
        (("/mixtral/qwen", "Qwen3MoeForCausalLM", "qwen3_moe"), "qwen3_moe"),
        (("/mixtral/qwen", "Qwen3MoeForCausalLM", None), "Qwen3MoeForCausalLM"),
        (("/models/mixtral", "AutoModelForCausalLM", ""), "/models/mixtral"),
        ((None, None, None), ""),
    ],
)
def test_the_type_tells_a_family_before_the_class_and_the_class_before_the_name(
    known: tuple[str | None, str | None, str | None], name: str
) -> None:
    assert telling_name(*known) == name
