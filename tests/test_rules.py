"""Each rule has an id that nothing else has, something that detects or mends it, and a test that exists."""

from __future__ import annotations

import ast
import re

import pytest

from lorashard import rules
from lorashard.rules import RULES, Rule
from lorashard.vllm_plugin.engine import guards
from lorashard.vllm_plugin.patches.table import PATCHES
from tests.rules_page import TESTS, patches_of, variable_of
from tests.tiny import REPO


def test_ids_are_short_words_and_each_is_one_rules() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", one) for one in ids)


def test_every_rule_that_the_module_defines_is_in_the_table() -> None:
    defined = [value for value in vars(rules).values() if isinstance(value, Rule)]
    assert sorted(rule.id for rule in defined) == sorted(rule.id for rule in RULES)


def test_what_refuses_and_what_mends_name_rules_of_the_table() -> None:
    named = [guard.hazard for guard in guards.RULES]
    named += [patch.hazard for patch in PATCHES if patch.hazard is not None]
    assert set(named) <= set(RULES)
    assert len({guard.hazard.id for guard in guards.RULES}) == len(guards.RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_that_is_seen_at_the_start_can_be_overridden_and_no_other(rule: Rule) -> None:
    assert (variable_of(rule) is not None) == ("start" in rule.seen)


def test_a_fault_of_vllm_that_is_mended_names_its_patches() -> None:
    assert patches_of(rules.UNEVEN_EXPERTS)[0].endswith("_load_adapter")
    assert {
        "fp8-activations",
        "local-expert-ids",
        "earlier-adapters-deltas",
        "stale-prefix-cache",
    } <= {rule.id for rule in RULES if patches_of(rule)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_its_test_exists(rule: Rule) -> None:
    file, name = TESTS[rule.id].split("::")
    functions = ast.parse((REPO / file).read_text()).body
    assert name in {item.name for item in functions if isinstance(item, ast.FunctionDef)}


def test_no_test_is_named_for_a_rule_that_is_gone() -> None:
    assert set(TESTS) == {rule.id for rule in RULES}


def test_links_are_to_a_thread_a_release_or_a_file() -> None:
    for rule in RULES:
        assert re.fullmatch(
            r"|https://github\.com/[\w.-]+/[\w.-]+/(issues|pull|blob|releases).*", rule.upstream
        )
