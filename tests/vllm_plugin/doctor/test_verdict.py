"""The verdict on a report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorashard.vllm_plugin.doctor.diagnosis import Report, diagnose
from lorashard.vllm_plugin.doctor.findings import Installation
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.problems import Problem
from lorashard.vllm_plugin.doctor.verdict import describe_verdict, reach_verdict


def report_of(*about: str, outcome: str | None = None) -> Report:
    here = Installation("0", "3", "python", "2", "0.33.0", True, True, {}, (), (), ())
    report = diagnose(here, (), EngineFlags(), None, None)
    return replace(report, problems=tuple(Problem(a, a) for a in about), outcome=outcome)


@pytest.mark.parametrize(
    ("about", "verdict"),
    [
        ((), "right"),
        (("flags",), "refused"),
        (("adapter", "flags"), "refused"),
        (("plugin",), "wrong"),
        (("flags", "patches"), "wrong"),
        (("vllm",), "wrong"),
    ],
)
def test_a_fault_of_the_environment_outweighs_a_refusal(
    about: tuple[str, ...], verdict: str
) -> None:
    report = report_of(*about)
    assert reach_verdict(report) == verdict
    assert describe_verdict(report).startswith(f"{verdict}: ")


def test_the_line_counts_problems_or_says_what_becomes_of_the_adapter() -> None:
    assert describe_verdict(report_of("flags", "flags")).endswith("(2 problems)")
    assert describe_verdict(report_of(outcome="is sliced")).endswith("; the adapter: is sliced")
