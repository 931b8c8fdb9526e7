"""What the plugin would do with real adapters: the loader's judgement, and vLLM's before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.base_model import ModelFacts, merge_facts, parse_model_config
from lorashard.adapter.options import LayoutOptions
from lorashard.vllm_plugin.doctor.adapter_outcome import AdapterOutcome, judge_adapter
from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from tests.adapters import LAYOUTS, Spec, build
from tests.tiny import MODULE, E, H, I, R, per_expert_tensors, save_adapter

FLAGS = EngineFlags(tensor_parallel_size=2, enable_expert_parallel=True)


def model(**config: Any) -> ModelFacts:
    known = {"model_type": "qwen3_moe", "num_experts": E, "hidden_size": H,
             "moe_intermediate_size": I}  # fmt: skip
    return parse_model_config(known | config, "config.json")


def judge(
    path: Path,
    flags: EngineFlags = FLAGS,
    facts: ModelFacts | None = None,
    *,
    placement: Any = "linear",
    strict: bool = False,
) -> AdapterOutcome:
    options = merge_facts(LayoutOptions(), facts)
    surveyed = survey_adapter(path, options, expert_parallel=flags.ep_size > 1)
    return judge_adapter(surveyed, flags, placement, facts, strict=strict)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "plain")


@pytest.fixture
def shards(plain: Path, tmp_path: Path) -> Path:
    split_adapter(plain, tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


def test_shards_as_placed_are_read_from_one_file_each(shards: Path) -> None:
    outcome = judge(shards, facts=model())
    size = max(file.stat().st_size for file in shards.glob("ep-*"))
    replicated = (shards / "replicated.safetensors").stat().st_size
    assert outcome == AdapterOutcome(
        f"each rank reads its own file, at most {size:,} bytes, plus {replicated:,} replicated "
        "bytes",
        as_placed=True,
    )


@pytest.mark.parametrize(
    ("flags", "placement"),
    [(replace(FLAGS, tensor_parallel_size=4), "linear"), (FLAGS, "round_robin"),
     (EngineFlags(), "linear")],
)  # fmt: skip
def test_shards_placed_otherwise_load_with_the_loaders_advice(
    shards: Path, flags: EngineFlags, placement: str
) -> None:
    outcome = judge(shards, flags, placement=placement)
    assert outcome.as_placed is False
    assert outcome.refusal is None
    assert outcome.text is not None
    assert outcome.text.startswith("loads, and warns: split for 2 ranks, with a different ")
    assert f"--ep-size {flags.ep_size}" in outcome.text


def test_more_ranks_than_experts_leave_some_ranks_without(shards: Path) -> None:
    outcome = judge(shards, replace(FLAGS, tensor_parallel_size=E + 1))
    assert outcome.text is not None
    assert f"--ep-size {E + 1}" in outcome.text


def test_with_strict_the_advice_is_a_refusal(shards: Path) -> None:
    outcome = judge(shards, EngineFlags(), strict=True)
    assert (outcome.text, outcome.as_placed) == (None, False)
    assert outcome.refusal is not None
    assert outcome.refusal.startswith(f"{shards}: split for 2 ranks, ")
    assert judge(shards, strict=True).refusal is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_experts": 8}, f"{MODULE}: the adapter has {E} experts, {MODULE} has 8."),
        ({"hidden_size": 9}, f"{MODULE}: gate_proj lora_A has {H} features, but {MODULE} has 9."),
        ({"moe_intermediate_size": 9}, f"gate_proj lora_B has {I} features, but {MODULE} has 9."),
        ({"model_type": "nemotron_h"}, f"{MODULE}: trains a gate, but the experts of {MODULE}"),
    ],
)
def test_another_model_is_refused_in_the_loaders_words(
    shards: Path, config: dict[str, Any], reason: str
) -> None:
    outcome = judge(shards, facts=model(**config))
    assert (outcome.text, outcome.as_placed) == (None, None)
    assert outcome.refusal is not None
    assert outcome.refusal.startswith(f"{shards}: ")
    assert reason in outcome.refusal


def test_a_plain_adapter_for_another_model_is_refused_too(plain: Path) -> None:
    assert "has 9" in (judge(plain, facts=model(hidden_size=9)).refusal or "")
    assert judge(plain, facts=model()).refusal is None


def test_an_r_beyond_the_engine_is_refused_with_a_value_that_vllm_takes(shards: Path) -> None:
    refused = judge(shards, replace(FLAGS, max_lora_rank=R - 1)).refusal
    assert refused is not None
    assert refused.startswith(f"{shards}: r={R}, the engine has room for {R - 1}. ")
    assert refused.endswith("Start vLLM with --max-lora-rank 8.")
    assert judge(shards, replace(FLAGS, max_lora_rank=R)).refusal is None


def test_what_is_not_the_plugins_goes_to_vllms_own_loader(plain: Path, tmp_path: Path) -> None:
    attention = {name: t for name, t in per_expert_tensors().items() if ".self_attn." in name}
    dense = save_adapter(tmp_path / "dense", attention)
    assert judge(plain, EngineFlags()).text == (
        "vLLM's own loader, since there is no expert parallelism"
    )
    assert judge(dense).text == "vLLM's own loader, since no expert is trained"


def test_what_cannot_be_read_is_refused_unless_a_model_would_make_it_readable(
    tmp_path: Path,
) -> None:
    nowhere = judge(tmp_path / "nowhere")
    assert "does not exist" in (nowhere.refusal or "")
    some = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    assert judge(save_adapter(tmp_path / "some", some)) == AdapterOutcome()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["plain", "shards"])
def test_without_a_model_no_layout_is_refused(tmp_path: Path, layout: str, form: str) -> None:
    adapter = build(Spec(layout, num_experts=5))
    path = adapter.write(tmp_path / "plain")
    if form == "shards":
        path = tmp_path / "shards"
        request = SplitRequest(2, options=LayoutOptions(**adapter.options))
        split_adapter(tmp_path / "plain", path, request)
    outcome = judge(path)
    assert outcome.refusal is None
    assert outcome.as_placed is (True if form == "shards" else None)
