"""The layers that an engine would have: from the model where it is named, else from the adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorashard.adapter.base_model import parse_model_config
from lorashard.shards.placement import linear_placement
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.live_layers import NamesOfAdapter, expected_layers, shown_sizes
from lorashard.vllm_plugin.load.contents import AdapterContents, NoSources
from lorashard.vllm_plugin.load.matching import match_layers
from lorashard.vllm_plugin.load.plain_plan import module_contents
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Spec, build
from tests.strategies import index_of, layout_of

FLAGS = EngineFlags(tensor_parallel_size=3, enable_expert_parallel=True, max_lora_rank=32)


def contents_of(layout: str, **fields: Any) -> AdapterContents:
    adapter = build(Spec(layout, **fields))
    read = layout_of(adapter)
    modules = module_contents(read, linear_placement(read.num_experts, 1))
    return AdapterContents(
        index_of(adapter).config, read.num_experts, gate_up_known=True, modules=modules, dense=(),
        sources=NoSources(),
    )  # fmt: skip


def model(**config: Any) -> Any:
    return parse_model_config({"model_type": "some_moe", "num_experts": 8, **config}, "config")


@pytest.mark.parametrize("order", ["concatenated", "interleaved"])
def test_without_a_model_rows_lie_as_the_adapter_has_them(order: Any) -> None:
    contents = contents_of("L2")
    modules = tuple(replace(module, gate_up=order) for module in contents.modules)
    contents = replace(contents, modules=modules)
    (layers,) = expected_layers(contents, replace(FLAGS, tensor_parallel_size=1), "linear", None)
    assert {live.interleaved for live in layers.values()} == {order == "interleaved"}
    assert len(match_layers(contents, layers, NamesOfAdapter())) == len(modules)


def test_each_rank_has_the_experts_of_its_placement() -> None:
    contents = contents_of("L1", num_experts=5, num_layers=2)
    ranks = list(expected_layers(contents, FLAGS, "round_robin", None))
    assert [layers["model.layers.1.mlp.experts"].local_experts for layers in ranks] == [
        (0, 3), (1, 4), (2,),
    ]  # fmt: skip
    assert [{live.ep_rank for live in layers.values()} for layers in ranks] == [{0}, {1}, {2}]
    first = ranks[0]["model.layers.0.mlp.experts"]
    assert (len(ranks[0]), first.ep_size, first.num_experts, first.max_lora_rank) == (2, 3, 5, 32)


def test_the_models_word_goes_before_the_adapters() -> None:
    contents = contents_of("L1", hidden=6, intermediate=5)
    named = model(hidden_size=60, moe_intermediate_size=50)
    (live,) = next(expected_layers(contents, FLAGS, "linear", named)).values()
    assert (live.num_experts, live.hidden_size, live.intermediate_size) == (8, 60, 50)
    assert (live.gated, live.interleaved) == (True, False)


def test_what_the_model_leaves_out_is_taken_from_the_adapter() -> None:
    contents = contents_of("L1", hidden=6, intermediate=5)
    (live,) = next(expected_layers(contents, FLAGS, "linear", model())).values()
    assert (live.num_experts, live.hidden_size, live.intermediate_size) == (8, 6, 5)


@pytest.mark.parametrize(
    ("model_type", "gated", "interleaved"),
    [("gpt_oss", True, True), ("nemotron_h", False, False), ("qwen3_moe", True, False)],
)
def test_gates_are_the_models(model_type: str, gated: bool, interleaved: bool) -> None:
    named = model(model_type=model_type)
    (live,) = next(expected_layers(contents_of("L1"), FLAGS, "linear", named)).values()
    assert (live.gated, live.interleaved) == (gated, interleaved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_shows_its_sizes(layout: str) -> None:
    for module in contents_of(layout, hidden=6, intermediate=5).modules:
        assert shown_sizes(module.stacks) == (6, 5)


@pytest.mark.parametrize("projections", [("gate_proj",), ("up_proj",), ("down_proj",)])
def test_one_projection_shows_both_sizes(projections: tuple[str, ...]) -> None:
    (module,) = contents_of("L1", hidden=6, intermediate=5, projections=projections).modules
    assert shown_sizes(module.stacks) == (6, 5)


@pytest.mark.parametrize(
    ("layout", "gated"),
    [(name, True) for name in LAYOUTS] + [(name, False) for name in NON_GATED_LAYOUTS],
)
def test_layers_made_from_the_adapter_take_it(layout: str, gated: bool) -> None:
    contents = contents_of(layout, gated=gated, num_layers=2)
    for layers in expected_layers(contents, FLAGS, "linear", None):
        assert len(match_layers(contents, layers, NamesOfAdapter())) == 2
