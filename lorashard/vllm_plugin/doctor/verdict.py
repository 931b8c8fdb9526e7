"""The verdict: one word and one line, before any detail. Pure."""

from __future__ import annotations

from typing import Literal

from lorashard.vllm_plugin.doctor.diagnosis import Report

Verdict = Literal["right", "refused", "wrong"]

# Problems with the environment: the plugin would not do its work, so nothing would be refused
# either, and adapters can be wrong.
_ENVIRONMENT = ("vllm", "plugin", "patches")


def reach_verdict(report: Report) -> Verdict:
    """right: nothing is amiss. refused: vLLM or the plugin refuses. wrong: the plugin does not work."""
    if any(problem.about in _ENVIRONMENT for problem in report.problems):
        return "wrong"
    return "refused" if report.problems else "right"


def describe_verdict(report: Report) -> str:
    """The line that says it."""
    verdict = reach_verdict(report)
    if verdict == "right":
        loads = f"; the adapter: {report.outcome}" if report.outcome is not None else ""
        return f"right: nothing is broken, and nothing would be refused{loads}"
    count = len(report.problems)
    problems = "1 problem" if count == 1 else f"{count} problems"
    what = (
        "the plugin would not work here"
        if verdict == "wrong"
        else "this engine or this adapter would be refused"
    )
    return f"{verdict}: {what} ({problems})"
