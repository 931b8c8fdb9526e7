"""adapter_config.json: what is read from it, and every feature and fault that is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lorashard.adapter.config import LoraConfig, parse_config
from lorashard.errors import AdapterError, UnsupportedAdapterError

WHERE = "a/adapter_config.json"


def parse(**fields: Any) -> LoraConfig:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields
    return parse_config(json.dumps(config).encode(), WHERE)


def refusal(**fields: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        parse(**fields)
    return caught.value


def test_r_and_alpha_are_read():
    config = parse(r=4, lora_alpha=2.5)
    assert (config.lora_rank, config.lora_alpha) == (4, 2.5)


def test_the_minimal_config_of_other_writers_is_enough():
    assert parse_config(b'{"r": 2, "lora_alpha": 4}', WHERE).rank_pattern == {}


def test_fields_that_are_null_are_as_good_as_absent():
    nulls = ("rank_pattern", "alpha_pattern", "target_parameters", "lora_B_layout", "auto_mapping",
             "modules_to_save", "trainable_token_indices", "layer_replication",
             "base_model_name_or_path", "init_lora_weights", "use_dora", "lora_bias")  # fmt: skip
    assert parse(**dict.fromkeys(nulls)) == parse()


@pytest.mark.parametrize("field", ["peft_version", "loftq_config"])
def test_peft_is_recognised_by_fields_of_its_own(field: str):
    assert parse(**{field: {}}).saved_by_peft


def test_another_writer_is_not_taken_for_peft():
    assert not parse().saved_by_peft


def test_the_class_of_the_base_model_comes_from_auto_mapping():
    mapping = {"base_model_class": "GptOssForCausalLM", "parent_library": "x"}
    assert parse(auto_mapping=mapping).base_model_class == "GptOssForCausalLM"


def test_target_parameters_keep_their_order():
    assert parse(target_parameters=["b", "a"]).target_parameters == ("b", "a")


@pytest.mark.parametrize("layout", ["rank_major", "grouped_by_expert"])
def test_a_known_lora_b_layout_is_read(layout: str):
    assert parse(lora_B_layout=layout).lora_b_layout == layout


@pytest.mark.parametrize("layout", ["expert_major", "", 1, [], True])
def test_an_unknown_lora_b_layout_is_refused(layout: object):
    assert isinstance(refusal(lora_B_layout=layout), UnsupportedAdapterError)


def test_scaling_is_alpha_by_r():
    assert parse(lora_alpha=16).scaling_of("m", 4) == 4.0


def test_scaling_with_rslora_is_alpha_by_the_root_of_r():
    assert parse(lora_alpha=16, use_rslora=True).scaling_of("m", 2) == 16 / math.sqrt(2)


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        ("gate_proj", "model.layers.0.mlp.experts.1.gate_proj", True),
        ("1.gate_proj", "model.layers.0.mlp.experts.1.gate_proj", True),
        ("1.gate_proj", "model.layers.0.mlp.experts.11.gate_proj", False),
        ("gate", "model.layers.0.mlp.experts.1.gate_proj", False),
        ("proj", "model.layers.0.mlp.experts.1.gate_proj", False),
        (r"experts\.\d+\.\w+", "model.layers.0.mlp.experts.1.gate_proj", True),
        (r".*\.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        (r".*\.gate_up_proj", "gate_up_proj", False),
        ("a|b", "x.b", True),
        ("^model.x", "model.x", True),
        ("x$", "model.x", True),
    ],
)
def test_a_pattern_is_a_regular_expression_for_the_end_of_the_name(
    key: str, module: str, matches: bool
):
    assert (parse(rank_pattern={key: 3}).rank_of(module) == 3) == matches


def test_the_first_pattern_that_matches_wins():
    config = parse(alpha_pattern={"a.x": 1.0, "x": 2.0, "b.x": 3.0})
    assert [config.scaling_of(name, 1) for name in ("a.x", "b.x")] == [1.0, 2.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"use_qalora": True},
        {"use_bdlora": {"x": 1}},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {"x": 1}},
        {"kasa_config": {"x": 1}},
        {"monteclora_config": {"x": 1}},
        {"velora_config": {"x": 1}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "CorDA"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["classifier", "model.embed_tokens"]},
    ],
    ids=str,
)
def test_a_feature_without_a_meaning_in_shards_is_refused(fields: dict[str, Any]):
    assert isinstance(refusal(**fields), UnsupportedAdapterError)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "lora"},
        {"modules_to_save": ["classifier", "model.score"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"bias": "none"},
    ],
    ids=str,
)
def test_a_feature_that_changes_nothing_here_is_accepted(fields: dict[str, Any]):
    assert parse(**fields).lora_rank == 8


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b"{'r': 1}", b'{"r": 1, "lora_alpha": 1'], ids=repr
)
def test_damaged_json_is_refused(raw: bytes):
    with pytest.raises(AdapterError, match="not JSON"):
        parse_config(raw, WHERE)


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"r"', b"8"])
def test_json_that_is_no_object_is_refused(raw: bytes):
    with pytest.raises(AdapterError, match="not a JSON object"):
        parse_config(raw, WHERE)


@pytest.mark.parametrize("r", [0, -1, 8.0, "8", None, True, [8]])
def test_r_must_be_a_positive_integer(r: object):
    assert "r is" in refusal(r=r).message


def test_a_missing_r_is_refused():
    with pytest.raises(AdapterError, match="r is null, not an integer >= 1"):
        parse_config(b'{"lora_alpha": 8}', WHERE)


@pytest.mark.parametrize("alpha", ["16", None, True, math.nan, math.inf, [16]])
def test_alpha_must_be_a_number(alpha: object):
    assert "lora_alpha is" in refusal(lora_alpha=alpha).message


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("patterns", [[1], "x", 7, {"(": 1}, {"x": "1"}, {"x": -1}, {"x": True}])
def test_a_damaged_pattern_is_refused(field: str, patterns: object):
    assert field in refusal(**{field: patterns}).message


@pytest.mark.parametrize("rank_pattern", [{}, {"y": 0}, {"x": 1}, {"x": False}])
def test_an_alpha_of_0_is_refused_where_r_is_not_0(rank_pattern: dict[str, Any]):
    assert "_pattern 'x' is" in refusal(alpha_pattern={"x": 0}, rank_pattern=rank_pattern).message


def test_a_module_without_a_rank_may_have_no_alpha():
    config = parse(rank_pattern={"a.x": 0, "x": 0}, alpha_pattern={"x": 0})
    assert (config.rank_of("b.x"), config.alpha_of("b.x"), config.rank_of("b.y")) == (0, 0, 8)


def test_the_scaling_of_alpha_0_is_never_used():
    config = parse(rank_pattern={"a.x": 2, "x": 0}, alpha_pattern={"x": 0})
    with pytest.raises(
        AdapterError, match=r"a\.x has r=2, but alpha_pattern gives it an alpha of 0"
    ):
        config.scaling_of("a.x", 2)


def test_a_rank_pattern_of_half_a_rank_is_refused():
    assert "rank_pattern" in refusal(rank_pattern={"x": 1.5}).message


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": 5},
        {"modules_to_save": 5},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"x": math.nan}},
        {"alpha_pattern": {"x": math.inf}},
        {"rank_pattern": {"(?i)x": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_odd_values_are_refused(fields: dict[str, Any]):
    assert next(iter(fields)) in refusal(**fields).message


def test_endless_nesting_is_refused():
    with pytest.raises(AdapterError, match="not JSON"):
        parse_config(b'{"a":' + b"[" * 200_000, WHERE)


def test_a_message_names_the_file():
    assert WHERE in str(refusal(r=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "("},
        {"target_modules": True},
        {"target_modules": [1]},
        {"exclude_modules": 5},
        {"exclude_modules": "["},
    ],
    ids=str,
)
def test_targets_that_peft_cannot_read_are_refused(fields: dict[str, Any]):
    assert next(iter(fields)) in refusal(**fields).message


@pytest.mark.parametrize("text", [b"\\ud800", b"\xed\xa0\x80"])
def test_a_lone_surrogate_is_refused(text: bytes):
    with pytest.raises(AdapterError, match=WHERE):
        parse_config(b'{"r": 1, "lora_alpha": 1, "revision": "' + text + b'"}', WHERE)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "use_rslora", "lora_B_layout"])
def test_no_depth_of_nesting_ends_in_a_recursion_error(field: str):
    for depth in range(850, 1050):
        nested = b"[" * depth + b"]" * depth
        raw = b'{"r": 1, "lora_alpha": 1, "rank_pattern": {"a": %s}}' % nested
        if field != "lora_B_layout":
            raw = b'{"r": 1, "lora_alpha": 1, "%s": %s}' % (field.encode(), nested)
        with pytest.raises(AdapterError):
            parse_config(raw, WHERE)


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 0}, {"lora_alpha": 0.0}, {"alpha_pattern": {"q_proj": 0}}]
)
def test_an_alpha_of_zero_is_for_the_user_to_fill_in(changes: dict[str, object]) -> None:
    raw = json.dumps({"r": 2, "lora_alpha": 4} | changes).encode()
    with pytest.raises(AdapterError, match="so the scaling is not known") as caught:
        parse_config(raw, "adapter_config.json")
    assert "of the training into adapter_config.json" in str(caught.value.hint)
