"""An adapter's names for MoE layers -> the engine's. vLLM's own renaming: loading.model_names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.vllm_plugin.engine.names import ModuleNames, find_moe_module, read_model_names

MLP = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts", "model.layers.11.mlp.experts"]
MIXTRAL = [name.replace("mlp", "block_sparse_moe") for name in MLP]
MULTIMODAL = [f"language_model.{name}" for name in MLP]
ALIASES = dict(zip(MLP, MULTIMODAL))


def found(module: str, live: list[str], renamed: str = "", **aliases: str) -> str | None:
    return find_moe_module(module, renamed or module, live, aliases)


@pytest.mark.parametrize("name", MLP)
def test_a_name_that_is_the_engine_s_is_taken_as_it_is(name: str) -> None:
    assert found(name, MLP) == name


def test_a_name_is_taken_as_vllm_renames_it() -> None:
    assert found(MLP[1], MULTIMODAL, renamed=MULTIMODAL[1]) == MULTIMODAL[1]


@pytest.mark.parametrize(("one", "other"), [(MLP, MIXTRAL), (MIXTRAL, MLP)])
def test_a_block_that_is_called_otherwise_is_known_by_its_layer(
    one: list[str], other: list[str]
) -> None:
    assert [found(name, other) for name in one] == other


def test_layer_1_is_not_layer_11() -> None:
    assert found(MLP[1], [MIXTRAL[2]]) is None
    assert found(MLP[2], [MIXTRAL[1]]) is None


def test_a_text_only_name_is_looked_up_in_a_multimodal_model() -> None:
    for short, long in ALIASES.items():
        assert find_moe_module(short, short, MULTIMODAL, ALIASES) == long
        assert find_moe_module("other", short, MULTIMODAL, ALIASES) == long


def test_a_text_only_name_of_another_block_is_found_by_prefix_and_layer() -> None:
    live = [f"language_model.{name}" for name in MIXTRAL]
    aliases = {f"model.layers.{n}.self_attn.q_proj": f"language_model.model.layers.{n}.self_attn.q_proj"
               for n in (0, 1, 11)}  # fmt: skip
    for short, long in zip(MLP, live):
        assert find_moe_module(short, short, live, aliases) == long


def test_a_layer_without_experts_is_nothing() -> None:
    assert found("model.layers.5.mlp.experts", MLP) is None
    assert found("experts", MLP) is None
    assert found(MLP[0], []) is None


def test_a_layer_with_two_moe_modules_is_not_guessed_at() -> None:
    live = ["model.layers.0.first.experts", "model.layers.0.second.experts"]
    assert found(MLP[0], live) is None
    assert found(live[1], live) == live[1]


def test_a_layer_of_another_stack_is_not_taken() -> None:
    assert found("model.layers.0.mlp.experts", ["mtp.layers.0.mlp.experts"]) is None


@given(
    order=st.permutations(MIXTRAL),
    module=st.sampled_from([*MLP, *MIXTRAL, *MULTIMODAL, "model.layers.7.mlp.experts"]),
)
def test_the_answer_is_a_live_layer_whatever_their_order(order: list[str], module: str) -> None:
    answer = found(module, order)
    assert answer == found(module, MIXTRAL)
    assert answer is None or answer in MIXTRAL


# What read_model_names takes of a LoRAModelManager.
class PPMissingLayer:
    pass


def manager(
    *modules: str, packed: dict[str, list[str]] | None = None, config: Any = None, **fields: Any
) -> Any:
    named = [("model.layers.0", SimpleNamespace()), ("model.layers.1", PPMissingLayer())]
    named += [(name, SimpleNamespace()) for name in modules]
    return SimpleNamespace(
        modules=dict.fromkeys(modules), packed_modules=packed or {},
        model=SimpleNamespace(named_modules=lambda: named, config=config),
        lora_config=SimpleNamespace(), **fields,
    )  # fmt: skip


def left_to_mtp(module: str, *modules: str, config: Any = None) -> bool:
    engine = manager(*modules, config=config)
    return ModuleNames(engine, read_model_names(engine), {}).is_left_to_mtp(module)


def test_parts_of_packed_layers_are_names_and_those_of_experts_are_not() -> None:
    attention, experts = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
    packed = {
        f"{attention}.qkv_proj": [f"{attention}.{part}_proj" for part in "qkv"],
        experts: [f"{experts}.0.gate_proj"],
    }
    names = read_model_names(manager(f"{attention}.qkv_proj", experts, packed=packed))
    parts = {f"{attention}.{part}_proj" for part in ("q", "k", "v", "qkv")}
    assert names.dense == {*parts, experts}


def test_layers_of_other_pipeline_stages_are_absent_with_all_below_them() -> None:
    names = read_model_names(manager("model.layers.0.mlp.experts"))
    assert names.absent == ("model.layers.1.",)
    assert names.aliases == {}


def test_names_of_a_text_only_adapter_stand_for_those_of_the_model() -> None:
    long = "language_model.model.layers.0.self_attn.o_proj"
    names = read_model_names(
        manager(long, _get_text_lora_names=lambda name: [name.removeprefix("language_model.")])
    )
    assert names.dense == {long, "model.layers.0.self_attn.o_proj"}
    assert names.aliases == {"model.layers.0.self_attn.o_proj": long}


def test_a_pooling_model_s_adapter_may_leave_out_the_model_prefix() -> None:
    names = read_model_names(manager("model.layers.0.o_proj", is_pooling_model=True))
    assert names.dense == {"model.layers.0.o_proj", "layers.0.o_proj"}


@pytest.mark.parametrize("block", ["mtp.layers.0", "model.mtp.layers.0", "model.mtp_block.0"])
def test_a_block_for_multi_token_prediction_is_left_to_the_draft_model(block: str) -> None:
    assert left_to_mtp(f"{block}.mlp.experts", MLP[0])
    assert not left_to_mtp(f"{block}.mlp.experts", MLP[0], f"{block}.mlp.experts")
    assert not left_to_mtp(MLP[0], MLP[0])
    assert not left_to_mtp("model.layers.0.smtp.experts", MLP[0])


@pytest.mark.parametrize("nested", [False, True])
def test_layers_numbered_on_after_the_last_are_left_to_the_draft_model(nested: bool) -> None:
    config = SimpleNamespace(num_hidden_layers=47, num_nextn_predict_layers=1)
    if nested:
        config = SimpleNamespace(text_config=config)
    assert left_to_mtp("model.layers.47.mlp.experts", MLP[0], config=config)
    for number in (4, 46, 48, 147, 470):
        assert not left_to_mtp(f"model.layers.{number}.mlp.experts", MLP[0], config=config)
    present = "model.layers.47.mlp.experts"
    assert not left_to_mtp(present, present, config=config)
    without = SimpleNamespace(num_hidden_layers=47)
    assert not left_to_mtp(present, MLP[0], config=without)
