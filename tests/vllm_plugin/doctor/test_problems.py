"""What is broken or refused, one problem for each fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorashard.vllm_plugin.doctor.findings import Installation, PatchState
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.problems import flag_problems, installation_problems
from lorashard.vllm_plugin.engine.guards import Refusal

HERE = Installation(
    lorashard="1", python="3.11", executable="/venv/bin/python", torch="2.9", vllm="0.33.0",
    entry_point=True, allowed=True, variables={}, switched_on=(), unknown=(), faults=(),
)  # fmt: skip
PATCH = PatchState(
    "vllm.x.Y.z", "broken", "there is no class Y", "why", "how", "link", "0.16.0", None
)


def test_a_sound_installation_has_none() -> None:
    applied = replace(PATCH, state="applied")
    unneeded = replace(PATCH, state="not needed")
    assert list(installation_problems(HERE, [applied, unneeded])) == []


@pytest.mark.parametrize(
    ("change", "about", "text"),
    [
        ({"vllm": None}, "vllm", "in this Python (/venv/bin/python)"),
        ({"vllm": "0.15.1"}, "vllm", "vLLM 0.15.1 is too old for lorashard (0.16.0 to 0.33.0)."),
        ({"entry_point": False}, "plugin", "would not find the plugin"),
        ({"allowed": False}, "plugin", "VLLM_PLUGINS"),
        ({"switched_on": ("LORASHARD_DISABLE",)}, "plugin", "LORASHARD_DISABLE is set"),
        ({"faults": ("LORASHARD_THREADS='x' is not",)}, "plugin", "LORASHARD_THREADS='x' is not"),
    ],
)
def test_each_fault_of_the_installation_is_one_problem(
    change: dict[str, Any], about: str, text: str
) -> None:
    (problem,) = installation_problems(replace(HERE, **change), [])
    assert problem.about == about
    assert text in problem.text


@pytest.mark.parametrize("vllm", ["0.99.0", "?"])
def test_a_vllm_that_is_newer_or_does_not_say_is_none(vllm: str) -> None:
    assert list(installation_problems(replace(HERE, vllm=vllm), [])) == []


def test_a_broken_patch_is_one_with_its_reason() -> None:
    (problem,) = installation_problems(HERE, [PATCH])
    assert problem.about == "patches"
    assert problem.text == "vllm.x.Y.z cannot be patched: there is no class Y."


def test_a_displaced_patch_is_one_unless_that_is_accepted() -> None:
    displaced = replace(HERE, displaced_patches=("A.f is g (x.py:1)",))
    (problem,) = installation_problems(displaced, [])
    assert problem.about == "patches"
    assert "A.f is g (x.py:1)" in problem.text
    accepted = replace(displaced, switched_on=("LORASHARD_RISK_PATCHED_BY_OTHERS",))
    assert list(installation_problems(accepted, [])) == []


def test_a_refusal_is_explained_with_its_way_out_and_variable() -> None:
    refusal = Refusal("x-y", "LORASHARD_RISK_X", "It is wrong.", "Do not.")
    (problem,) = flag_problems(EngineFlags(), [refusal])
    assert problem.text == (
        "It is wrong. Do not. To start anyway, accepting the risk in its name, set "
        "LORASHARD_RISK_X=1 (rule x-y)."
    )


def test_eplb_on_one_rank_is_vllms_own_refusal() -> None:
    (problem,) = flag_problems(EngineFlags(tensor_parallel_size=2, enable_eplb=True), [])
    assert problem.text.startswith("vLLM itself accepts --enable-eplb only with ")
    several = EngineFlags(2, enable_expert_parallel=True, enable_eplb=True)
    assert list(flag_problems(several, [])) == []
