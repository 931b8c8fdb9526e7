"""The records of the table are complete, right in themselves, and about different things."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorashard.vllm_plugin.doctor.releases import FIRST_KNOWN, LAST_KNOWN
from lorashard.vllm_plugin.patches.apply import Patch
from lorashard.vllm_plugin.patches.table import PATCHES

every_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


@every_patch
def test_why_and_how_are_sentences(patch: Patch) -> None:
    for text in (patch.why, patch.how):
        assert re.fullmatch(r"[A-Z-].{20,}\.", text)
        assert "  " not in text


@every_patch
def test_the_link_is_to_a_line_an_issue_or_a_pull_request_of_vllm(patch: Patch) -> None:
    line = r"blob/v\d+\.\d+\.\d+/vllm/[a-z0-9_/]+\.py#L\d+"
    vllm = "https://github.com/vllm-project/vllm"
    assert re.fullmatch(rf"{vllm}/({line}|(issues|pull)/\d+)", patch.upstream)


@every_patch
def test_its_releases_are_known_ones_in_order(patch: Patch) -> None:
    assert FIRST_KNOWN <= number(patch.since) <= number(patch.until or "99") <= (99,)
    assert number(patch.since) <= LAST_KNOWN
    if patch.until is not None:
        assert number(patch.until) <= LAST_KNOWN


@every_patch
def test_a_patch_with_an_end_looks_whether_the_release_needs_it(patch: Patch) -> None:
    always = Patch.__dataclass_fields__["needed"].default
    assert (patch.needed is not always) == (patch.until is not None)


@every_patch
def test_its_parameters_begin_with_self_or_cls_in_a_class_and_are_named_once(patch: Patch) -> None:
    assert (patch.parameters[0] in {"self", "cls"}) == bool(patch.owner)
    assert len(set(patch.parameters)) == len(patch.parameters)


def test_no_method_is_patched_twice() -> None:
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


def test_every_replacement_is_in_the_table() -> None:
    from importlib import import_module

    names = (
        "activation", "activations", "adapter_adding", "adapter_loading", "adapter_packing", "data_parallel", "engine_start",
        "expert_parallel", "fully_sharded", "peft_patterns", "punica", "reading_ahead", "rebalancing", "refused_adds", "same_names",
        "unloading", "warm_up",
    )  # fmt: skip
    written: set[Any] = set()
    for name in names:
        module = import_module(f"lorashard.vllm_plugin.patches.{name}")
        written |= {value for key, value in vars(module).items() if key.startswith("wrap_")}
    assert {patch.wrap for patch in PATCHES} == written
