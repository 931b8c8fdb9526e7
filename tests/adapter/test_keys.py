"""What each spelling of a tensor name means, and which names are refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorashard.adapter.keys import (
    ExpertKey,
    FullWeightKey,
    LoraKey,
    UnknownKey,
    clean_name,
    parse_key,
)

P = "base_model.model.model.layers.3.mlp"
MODULE = "model.layers.3.mlp.experts"


def expert_key(name: str, num_dims: int = 2) -> ExpertKey:
    key = parse_key(name, num_dims)
    assert isinstance(key, ExpertKey)
    return key


@pytest.mark.parametrize(
    ("name", "num_dims", "expected"),
    [
        # L1
        ("experts.17.gate_proj.lora_A.weight", 2, ("expert", "gate_proj", "lora_A", 17)),
        ("experts.0.up_proj.lora_B.weight", 2, ("expert", "up_proj", "lora_B", 0)),
        ("experts.0.down_proj.lora_A", 2, ("expert", "down_proj", "lora_A", 0)),
        ("experts.5.w1.lora_A.weight", 2, ("expert", "gate_proj", "lora_A", 5)),
        ("experts.5.w3.lora_A.weight", 2, ("expert", "up_proj", "lora_A", 5)),
        ("experts.5.w2.lora_A.weight", 2, ("expert", "down_proj", "lora_A", 5)),
        # L2, L3, L4, L6, L7
        ("experts.base_layer.lora_A.weight", 2, ("inner", None, "lora_A", None)),
        ("experts.lora_B.weight", 2, ("outer", None, "lora_B", None)),
        # L8, L9, L10, L11, L14
        ("experts.w1.lora_A", 3, ("stacked", "gate_proj", "lora_A", None)),
        ("experts.w3.lora_B", 3, ("stacked", "up_proj", "lora_B", None)),
        ("experts.gate_proj.lora_A.weight", 3, ("stacked", "gate_proj", "lora_A", None)),
        ("experts.down_proj.lora_B.weight", 2, ("stacked", "down_proj", "lora_B", None)),
        ("experts.gate_up_proj.lora_A.weight", 3, ("stacked", "gate_up_proj", "lora_A", None)),
        # L12
        ("up_proj.lora_A", 3, ("stacked", "up_proj", "lora_A", None)),
        # L13
        ("experts.lora_gate_and_up_A", 3, ("native", "gate_up_proj", "lora_A", None)),
        ("experts.lora_down_B", 3, ("native", "down_proj", "lora_B", None)),
        # L15
        ("experts.gate_up_projs.4.lora_A.weight", 2, ("expert", "gate_up_proj", "lora_A", 4)),
        ("experts.down_projs.31.lora_B.weight", 2, ("expert", "down_proj", "lora_B", 31)),
    ],
)
def test_every_writer_s_spelling_of_an_expert_tensor_is_known(name, num_dims, expected):
    key = expert_key(f"{P}.{name}", num_dims)
    assert key.module == MODULE
    assert (key.kind, key.projection, key.matrix, key.expert) == expected


@pytest.mark.parametrize(
    ("leaf", "projection"), [("input_linear", "gate_up_proj"), ("output_linear", "down_proj")]
)
def test_granite_s_experts_have_no_container_in_their_names(leaf: str, projection: str):
    key = expert_key(f"base_model.model.model.layers.0.block_sparse_moe.{leaf}.lora_A.weight")
    assert (key.kind, key.projection) == ("parameter", projection)
    assert key.module == "model.layers.0.block_sparse_moe.experts"


def test_an_expert_id_is_a_number():
    name = f"{P}.experts.10.gate_proj.lora_A.weight"
    assert expert_key(name).expert == 10


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_peft_s_prefix_is_not_part_of_the_module(prefix: str):
    assert expert_key(f"{prefix}layers.0.experts.0.w1.lora_A").module == "layers.0.experts"


def test_an_experts_container_may_be_the_root():
    assert expert_key("experts.0.w1.lora_A").module == "experts"


def test_the_innermost_container_is_the_module():
    key = expert_key("a.experts.1.b.experts.2.w1.lora_A")
    assert (key.module, key.expert) == ("a.experts.1.b.experts", 2)


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.router",
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.shared_experts.gate_proj",
        "model.layers.3.mlp.shared_expert.down_proj",
        "model.layers.3.mlp.shared_expert_gate",
        "lm_head",
    ],
)
def test_a_factor_outside_of_experts_is_replicated(module: str):
    key = parse_key(f"base_model.model.{module}.lora_B.weight", 2)
    assert key == LoraKey(module, "lora_B", embedding=False)


def test_embedding_factors_have_names_of_their_own():
    key = parse_key("base_model.model.model.embed_tokens.lora_embedding_A", 2)
    assert key == LoraKey("model.embed_tokens", "lora_A", embedding=True)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.score.weight",
        "base_model.model.classifier.out_proj.bias",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.base_layer.weight",
    ],
)
def test_whole_weights_that_peft_saves_are_carried_along(name: str):
    assert parse_key(name, 2) == FullWeightKey()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{P}.experts.0.gate_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "DoRA"),
        (f"{P}.experts.0.gate_proj.lora_B.bias", "LoRA bias"),
        (f"{P}.gate.lora_A.bias", "LoRA bias"),
        ("base_model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable tokens"),
        (f"{P}.experts.0.gate_proj.weight", "expert tensors"),
        (f"{P}.experts.gate_up_proj_lora_A", "expert tensors"),
        (f"{P}.experts.-1.w1.lora_A", "expert tensors"),
        (f"{P}.experts.0.shared.w1.lora_A", "expert tensors"),
        (f"{P}.experts.0.wi.lora_A", "projection called 'wi'"),
        (f"{P}.experts.up.lora_A", "projection called 'up'"),
        (f"{P}.experts.1.lora_A.weight", "projection called '1'"),
        (f"{P}.gate.e_score_correction_bias", "a tensor other than a LoRA factor"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
            "a tensor other than a LoRA factor",
        ),
        ("lora_A.weight", "a tensor other than a LoRA factor"),
        ("", "a tensor other than a LoRA factor"),
        ("base_model.model.a b.lora_A.weight", "a tensor other than a LoRA factor"),
    ],
)
def test_a_name_without_a_known_meaning_is_refused(name: str, reason: str):
    key = parse_key(name, 2)
    assert isinstance(key, UnknownKey)
    assert reason in key.reason


@pytest.mark.parametrize("num_dims", [0, 1, 3, 4])
def test_a_replicated_factor_has_two_dimensions(num_dims: int):
    key = parse_key("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", num_dims)
    assert isinstance(key, UnknownKey)


@pytest.mark.parametrize("tail", ["\n", " ", ".default", "x"])
def test_a_name_is_matched_to_its_end(tail: str):
    assert isinstance(parse_key(f"{P}.experts.0.w1.lora_A.weight{tail}", 2), UnknownKey)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
        ("module._orig_mod.base_model.model.q.lora_B.weight", "base_model.model.q.lora_B.weight"),
        ("module.module.q.lora_A.weight", "q.lora_A.weight"),
        (
            "base_model.model.layers.0._checkpoint_wrapped_module.q.lora_A.weight",
            "base_model.model.layers.0.q.lora_A.weight",
        ),
        (
            "_fsdp_wrapped_module.a._fsdp_wrapped_module._orig_mod.q.lora_B.weight",
            "a.q.lora_B.weight",
        ),
        ("q.lora_A.default.weight", "q.lora_A.weight"),
        ("embed_tokens.lora_embedding_B.default", "embed_tokens.lora_embedding_B"),
    ],
)
def test_wrappers_and_the_adapter_s_name_are_no_part_of_a_name(name: str, clean: str):
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.a.lora_A.weight", "a.lora_A", "a.lora_B.bias", "a.lora_embedding_A",
        "model.module.q.lora_A.weight", "a.lora_magnitude_vector.default.weight",
    ],
)  # fmt: skip
def test_other_names_stay_as_they_are(name: str):
    assert clean_name(name) == name


def test_the_experts_container_of_a_wrapped_model_is_called_what_the_model_calls_it():
    key = expert_key(f"_orig_mod.{P}._fsdp_wrapped_module.experts.2.w1.lora_A.default.weight")
    assert key == ("expert", MODULE, "gate_proj", "lora_A", 2)


@pytest.mark.parametrize(
    ("name", "reason", "way_out"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight0", "Megatron's", "Bridge"),
        ("decoder.layers.8.mlp.shared_experts.linear_fc2.adapter.linear_out.weight", "Megatron's", "Bridge"),
        ("base_model.model.model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.down_proj.lora_A.weight", "DeepSpeed", "vLLM has no model"),
        ("base_model.model.model.layers.0.mlp.deepspeed_moe.gate.wg.lora_A.weight", "DeepSpeed", "vLLM has no model"),
    ],
)  # fmt: skip
def test_names_of_other_formats_say_whose_they_are(name: str, reason: str, way_out: str) -> None:
    key = parse_key(name, 2)
    assert isinstance(key, UnknownKey)
    assert reason in key.reason
    assert way_out in key.hint


# What a full weight is called, as one pattern; it takes a time quadratic in the name's length.
FULL_WEIGHT = re.compile(
    r"(?:base_model\.model\.)?(?:[^ ]+\.)?(?:(?:score|classifier)(?:\.[^ ]+)?\.(?:weight|bias)"
    r"|(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight)"
)
PARTS = st.sampled_from(
    ["base_model.model.", "score", "classifier", ".", "weight", ".weight", ".bias", "embed_tokens",
     "lm_head", ".base_layer", "x", " ", "score.", ".score", "lm_head."]
)  # fmt: skip


@given(st.lists(PARTS, max_size=7).map("".join))
@example(".score.weight")
@example("score..weight")
@example("score.weight.weight")
@example("a.score.x y.weight")
def test_the_names_of_full_weights_are_those_of_one_pattern(name: str):
    is_full = isinstance(parse_key(name, 2), FullWeightKey)
    assert is_full == (FULL_WEIGHT.fullmatch(name) is not None)


@pytest.mark.parametrize(
    "piece", ["score.", "score", "lm_head.", "experts.", "experts.0.", ".lora_A", "a"]
)
@pytest.mark.parametrize("end", ["x", ".weight", ".lora_A.x"])
def test_a_name_takes_a_time_in_proportion_to_its_length(piece: str, end: str):
    def seconds(length: int) -> float:
        name = piece * (length // len(piece)) + end
        begin = time.process_time()
        parse_key(name, 2)
        return time.process_time() - begin

    assert seconds(200_000) < 40 * seconds(20_000) + 0.1
