"""`doctor`: what the vLLM plugin finds here, and would do with these flags and this adapter.

`survey.py` looks, `diagnosis.py` decides, this prints.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lorashard.adapter.base_model import merge_facts
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import read_model_facts
from lorashard.cli import render
from lorashard.errors import NotReadyError
from lorashard.storage.remote import locate
from lorashard.vllm_plugin.doctor.diagnosis import EngineFlags, Report, diagnose
from lorashard.vllm_plugin.doctor.survey import has_vllm, survey, survey_adapter

__all__ = ["EngineFlags", "run_doctor"]


def run_doctor(path: Path | None, flags: EngineFlags, model: str | None, *, as_json: bool) -> None:
    """Look, decide, print. Raises NotReadyError if anything would be refused or is broken."""
    facts = read_model_facts(locate(model)) if model else None
    if has_vllm():
        render.say("importing vLLM ...")
    installation, patches = survey()
    found = None
    if path is not None:
        options = merge_facts(LayoutOptions(), facts)
        found = survey_adapter(path, options, expert_parallel=flags.ep_size > 1)
    report = diagnose(installation, patches, flags, facts, found)
    if as_json:
        render.print_json(asdict(report))
    else:
        _show(report)
    if not report.ok:
        count, first = len(report.problems), report.problems[0].text.partition("\n")[0]
        raise NotReadyError(f"{count} {'thing is' if count == 1 else 'things are'} wrong: {first}")


def _show(report: Report) -> None:
    here = report.installation
    releases = " to ".join(report.known_releases)
    known = "known" if report.vllm_known else "not known"
    render.print_facts({
        "lorashard": here.lorashard,
        "Python": f"{here.python}, {here.executable}",
        "torch": here.torch or "not installed",
        "vLLM": f"{here.vllm}, {known} to lorashard ({releases} are)" if here.vllm
        else "not installed",
        "plugin": "found by vLLM" if here.entry_point else "not found by vLLM",
        **here.variables,
    })  # fmt: skip
    render.print_line("\nPatches to vLLM")
    for position, patch in enumerate(report.patches):
        reason = f": {patch.reason}" if patch.reason else ""
        render.print_line(f"  {patch.target}: {patch.state}{reason}")
        following = report.patches[position + 1 : position + 2]
        if any(other.why == patch.why for other in following):
            continue  # told once for neighbours
        until = f" until {patch.until}" if patch.until else ""
        render.print_line(f"    why       {patch.why}\n    how       {patch.how}")
        render.print_line(f"    upstream  {patch.upstream}, from {patch.since}{until}")
    render.print_line(
        f"\nEngine: {report.ep_size} expert-parallel ranks, experts placed {report.placement}"
        if report.ep_size > 1
        else "\nEngine: no expert parallelism (-tp N --enable-expert-parallel)"
    )
    if report.known_once_loaded:
        render.print_line("  Known only once a model is loaded:")
        for fact in report.known_once_loaded:
            render.print_line(f"    {fact}")
    _show_adapter(report)
    render.print_line("")
    for note in report.notes:
        render.print_line(f"note: {note}")
    for problem in report.problems:
        render.print_line(f"problem: {problem.text}")
    if report.ok:
        render.print_line("ok: nothing would be refused, nothing is broken")


def _show_adapter(report: Report) -> None:
    found = report.adapter
    if found is None:
        return
    holds = [f"{found.num_experts} experts"] if found.num_experts else []
    holds += [f"r={found.lora_rank}"] if found.lora_rank else []
    holds += [f"{found.strategy} on {len(found.ranks)} ranks"] if found.ranks else []
    render.print_line(f"\nAdapter: {found.path}, {', '.join([found.kind, *holds])}")
    if report.outcome is not None:
        render.print_line(f"  {report.outcome}")
