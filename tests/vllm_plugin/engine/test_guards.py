"""What is refused at start, and that each refusal names a way out."""

from __future__ import annotations

import dataclasses
import re
from itertools import combinations
from typing import Any

import pytest

from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.guards import (
    NIXL_EPLB,
    RULES,
    TOO_FEW_SLOTS,
    VARIABLES,
    EngineFacts,
    Refusal,
    contract_refusal,
    find_refusals,
)

GOOD = EngineFacts(
    expert_parallel=True,
    data_parallel_size=1,
    eplb=False,
    num_experts=128,
    experts_class="TritonExperts",
)
# What is changed in a good engine -> the refusal that it is for, and what its text must name.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE": (
        {"eplb": True, "eplb_obstacle": "Ranks come and go."},
        "Ranks come and go.",
    ),
    "LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL": (
        {"data_parallel_size": 4, "data_parallel_obstacle": "Engines come and go."},
        "--data-parallel-size 4",
    ),
    "LORASHARD_RISK_UNKNOWN_VLLM": (
        {"contract_breaks": ("no create_lora_weights", "no modules")},
        "no create_lora_weights; no modules",
    ),
    "LORASHARD_RISK_PATCHED_BY_OTHERS": (
        {"displaced": ("A.f is g (x.py:1)", "B.f is h (y.py:2)")},
        "A.f is g (x.py:1); B.f is h (y.py:2)",
    ),
    "LORASHARD_RISK_IGNORED_EXPERT_LORA": (
        {"experts_class": "TritonWNA16Experts", "reads_lora": False},
        "TritonWNA16Experts",
    ),
    "LORASHARD_RISK_WRONGLY_WEIGHTED_EXPERT_LORA": ({"weighs_inputs": True}, "router's weight"),
    "LORASHARD_RISK_WEIGHTS_OF_ANOTHER_KERNEL": (
        {"rearranged_for": "FlashInfer CUTLASS"},
        "FlashInfer CUTLASS",
    ),
    "LORASHARD_RISK_STALE_ROWS_OF_REMOTE_EXPERTS": (
        {"experts_class": "UnfusedOAITritonExperts", "leaves_rows": True},
        "UnfusedOAITritonExperts",
    ),
}


def refusal(variable: str) -> Refusal:
    (found,) = find_refusals(dataclasses.replace(GOOD, **FAULTS[variable][0]))
    return found


def test_a_good_engine_is_not_refused() -> None:
    assert find_refusals(GOOD) == ()


def test_what_is_not_known_yet_refuses_nothing() -> None:
    known_early = EngineFacts(expert_parallel=True, data_parallel_size=1, eplb=True)
    assert find_refusals(known_early) == ()


def test_what_the_configuration_alone_says_is_refused_before_a_model_is_loaded() -> None:
    known_early = EngineFacts(
        expert_parallel=True, data_parallel_size=2, data_parallel_obstacle=TOO_FEW_SLOTS,
        eplb=True, eplb_obstacle=NIXL_EPLB,
    )  # fmt: skip
    assert len(find_refusals(known_early)) == 2


@pytest.mark.parametrize("variable", FAULTS)
def test_each_rule_stands_alone(variable: str) -> None:
    assert refusal(variable).variable == variable


@pytest.mark.parametrize("variable", FAULTS)
def test_the_text_names_what_is_wrong_a_way_out_and_the_variable(variable: str) -> None:
    found = refusal(variable)
    assert FAULTS[variable][1] in found.reason
    assert re.match(r"(Start|Use|Choose|Update) .*\.$", found.way_out)
    text = str(found)
    assert text.startswith("lorashard: ")
    assert text.endswith(
        f" To start anyway, accepting the risk in its name, set {variable}=1 (rule {found.rule})."
    )
    assert found.reason in text
    assert found.way_out in text
    assert text == f"lorashard: {found.explanation}"


@pytest.mark.parametrize(("one", "other"), list(combinations(FAULTS, 2)))
def test_two_faults_are_both_reported(one: str, other: str) -> None:
    changes = FAULTS[one][0] | FAULTS[other][0]
    found = find_refusals(dataclasses.replace(GOOD, **changes))
    assert [refused.variable for refused in found] == [
        variable for variable in VARIABLES if variable in (one, other)
    ]


@pytest.mark.parametrize("elsewhere", [{"expert_parallel": False}, {"num_experts": 0}])
@pytest.mark.parametrize("variable", FAULTS)
def test_without_expert_parallelism_or_experts_nothing_is_refused(
    variable: str, elsewhere: dict[str, Any]
) -> None:
    facts = dataclasses.replace(GOOD, **FAULTS[variable][0], **elsewhere)
    assert find_refusals(facts) == ()


def test_every_rule_is_tried_here_and_has_a_variable_of_its_own() -> None:
    assert set(VARIABLES) == set(FAULTS)
    assert len(set(VARIABLES)) == len(VARIABLES)


def test_each_variable_says_what_is_risked_and_is_no_other_setting() -> None:
    for variable in VARIABLES:
        assert re.fullmatch(r"LORASHARD_RISK_[A-Z0-9_]+", variable)
        assert variable not in settings.VARIABLES


def test_broken_contracts_are_refused_without_expert_parallelism_too() -> None:
    breaks = ("no create_lora_weights", "no modules")
    with_ep = find_refusals(dataclasses.replace(GOOD, contract_breaks=breaks))
    assert contract_refusal(breaks) == with_ep[0]
    assert contract_refusal(()) is None


def test_texts_from_vllm_are_not_taken_for_format_strings() -> None:
    found = contract_refusal(["a {facts} of vLLM's, {0} and {"])
    assert found is not None
    assert "relies on: a {facts} of vLLM's, {0} and {." in found.reason


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.variable)
def test_every_placeholder_of_a_rule_is_filled(rule: Any) -> None:
    facts = dataclasses.replace(GOOD, **FAULTS[rule.variable][0])
    assert rule.applies(facts)
    assert not rule.applies(GOOD)
    assert not re.search(r"[{}]|None", rule.refusal(facts).reason)
