"""target_modules and target_parameters by PEFT's own rules, the source's entries kept where good."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.convert.peft_targets import (
    PeftTargets,
    choose_targets,
    is_target_module,
    is_target_parameter,
)
from lorashard.errors import UnsupportedAdapterError

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
GATE = "model.layers.0.mlp.gate"
UP = "model.layers.0.mlp.shared_expert.up_proj"
EXPERTS = {
    "per_expert": [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(2)],
    "fused": ["model.layers.0.mlp.experts.down_proj"],
}


def choose(
    layout: str, *others: str, parameters: tuple[str, ...] = (), **source: Any
) -> PeftTargets:
    return choose_targets(source, layout, EXPERTS[layout], others, frozenset(parameters))


@pytest.mark.parametrize("targets", [
    ["q_proj"], [Q], ["attn.q_proj"], ["proj"], [], None, r".*\.q_proj", "q_proj", r".*attn\..*", [7],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", [Q, K, "q_proj"])
def test_a_target_module_is_what_peft_takes_for_one(targets: Any, name: str) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = SimpleNamespace(target_modules=targets or [], target_parameters=None)
    expected = bool(tuners.check_target_module_exists(config, name))
    assert is_target_module(targets, name) == expected


def test_a_target_parameter_is_the_end_of_a_weight_s_name() -> None:
    assert is_target_parameter(["mlp.gate.weight"], GATE)
    assert is_target_parameter([f"{GATE}.weight"], GATE)
    assert not is_target_parameter(["ate.weight", "mlp.gate", "gate.bias"], GATE)


def test_good_entries_of_the_source_are_kept_and_the_rest_is_named_in_full() -> None:
    chosen = choose("per_expert", Q, K, UP, target_modules=["v_proj", "q_proj", "up_proj"])
    assert chosen.modules == ("q_proj", K, UP, "experts.0.down_proj", "experts.1.down_proj")
    assert chosen.parameters == ()


def test_what_peft_takes_for_experts_is_a_parameter_beside_fused_ones() -> None:
    chosen = choose("fused", Q, UP, GATE, target_modules=["q_proj", "up_proj", "gate"])
    assert chosen.modules == ("q_proj",)
    assert chosen.parameters == (f"{UP}.weight", "gate.weight", "experts.down_proj")


@pytest.mark.parametrize(
    ("source", "parameters"),
    [({"target_modules": ["gate"]}, ()), ({"target_modules": ["q_proj"]}, ("gate.weight",))],
    ids=["was-a-module", "unknown"],
)
def test_a_router_is_a_module_only_if_the_source_says_so(
    source: dict[str, Any], parameters: tuple[str, ...]
) -> None:
    assert choose("per_expert", GATE, **source).parameters == parameters


def test_what_was_a_parameter_stays_one() -> None:
    assert choose("per_expert", Q, parameters=(Q,)).parameters == (f"{Q}.weight",)


@pytest.mark.parametrize(
    "filters",
    [{"layers_to_transform": [0]}, {"exclude_modules": ["down_proj"]},
     {"exclude_modules": r".*experts.*"}],
    ids=str,
)  # fmt: skip
def test_a_filter_that_interferes_goes_and_all_is_named_in_full(filters: dict[str, Any]) -> None:
    chosen = choose("per_expert", Q, target_modules=["q_proj"], **filters)
    assert chosen.modules[0] == Q
    assert chosen.filters == dict.fromkeys(filters)


def test_a_filter_that_does_not_interfere_stays() -> None:
    chosen = choose("per_expert", Q, target_modules=["q_proj"], exclude_modules=["v_proj"])
    assert (chosen.modules[0], chosen.filters) == ("q_proj", {"exclude_modules": ["v_proj"]})


def test_a_pattern_of_the_source_is_replaced_by_full_names() -> None:
    assert choose("fused", Q, K, target_modules=r".*\.(q|k)_proj").modules == (Q, K)


def test_targets_that_re_never_finishes_take_no_time():
    assert not is_target_module(r"(([a-z0-9._]+)+)+!", "model.layers.0." + "a" * 2000)


@pytest.mark.parametrize("targets", [r".*(?=\.)q", r"(a)\1"])
def test_targets_that_need_backtracking_are_refused_by_name(targets: str):
    with pytest.raises(UnsupportedAdapterError) as error:
        is_target_module(targets, "a.q")
    assert ascii(targets) in str(error.value)
