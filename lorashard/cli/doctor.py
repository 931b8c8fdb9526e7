"""`doctor`: what the vLLM plugin finds here, and would do with these flags and this adapter.

`vllm_plugin.doctor` looks and decides; this prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import NotReadyError
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.vllm_plugin.doctor.diagnosis import Report
    from lorashard.vllm_plugin.doctor.findings import PatchState


def _with_flags(document: Any) -> Any:
    """A document with options in place of parameters in all of its texts."""
    if isinstance(document, dict):
        return {name: _with_flags(value) for name, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_with_flags(value) for value in document]
    return with_flags(document) if isinstance(document, str) else document


def _lines(problem: str) -> list[str]:
    """What is wrong, and the hint, if there is one. Other newlines are of a name, and are escaped."""
    text, newline, hint = problem.rpartition("\n  ")
    return [text, f"  {hint}"] if newline else [hint]


def _show(report: Report, *, verbose: bool) -> None:
    """The verdict, what leads to it, and with -v all the rest."""
    from lorashard.vllm_plugin.doctor.verdict import describe_verdict  # noqa: PLC0415

    render.print_line(describe_verdict(report))
    for problem in report.problems:
        for line in _lines(f"problem: {with_flags(problem.text)}"):
            render.print_line(line)
    for note in report.notes:
        render.print_line(f"note: {with_flags(note)}")
    render.print_line("")
    if verbose:
        _show_installation(report)
        _show_patches(report.patches)
    else:
        _show_summary(report)
    _show_engine(report, verbose=verbose)
    _show_adapter(report)
    if verbose and report.ignored:
        render.print_line("")
        render.print_line("Ignored, since expert LoRA does not depend on it")
        for words in report.ignored:
            render.print_line(f"  {words}")


def _show_summary(report: Report) -> None:
    here = report.installation
    states = Counter(patch.state for patch in report.patches)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    found = "found" if here.entry_point else "not found"
    render.print_line(
        f"lorashard {here.lorashard}, vLLM {here.vllm or 'not installed'}, plugin {found} by vLLM"
    )
    render.print_line(f"Patches: {counted} (-v lists them)")


def _show_installation(report: Report) -> None:
    here = report.installation
    tested = "tested" if report.vllm_known else "not tested"
    releases = " to ".join(report.known_releases)
    render.print_facts({
        "lorashard": here.lorashard,
        "Python": f"{here.python}, {here.executable}",
        "torch": here.torch or "not installed",
        "vLLM": f"{here.vllm}, {tested} with lorashard ({releases} are)" if here.vllm
        else "not installed",
        "plugin": "found by vLLM" if here.entry_point else "not found by vLLM",
        **here.variables,
    })  # fmt: skip


def _show_patches(patches: Sequence[PatchState]) -> None:
    render.print_line("")
    render.print_line("Patches to vLLM")
    for position, patch in enumerate(patches):
        reason = f": {patch.reason}" if patch.reason else ""
        render.print_line(f"  {patch.target}: {patch.state}{reason}")
        if any(following.why == patch.why for following in patches[position + 1 : position + 2]):
            continue  # neighbours with one reason share its text
        until = f" until {patch.until}" if patch.until else ""
        render.print_line(f"    why       {patch.why}")
        render.print_line(f"    how       {patch.how}")
        render.print_line(f"    upstream  {patch.upstream}, from {patch.since}{until}")


def _show_engine(report: Report, *, verbose: bool) -> None:
    if verbose:
        render.print_line("")
    render.print_line(
        f"Engine: {report.ep_size} expert-parallel ranks, experts placed {report.placement}"
        if report.ep_size > 1
        else "Engine: no expert parallelism (-tp N --enable-expert-parallel)"
    )
    if verbose and report.known_once_loaded:
        render.print_line("  Known only once a model is loaded:")
        for fact in report.known_once_loaded:
            render.print_line(f"    {fact}")


def _show_adapter(report: Report) -> None:
    adapter = report.adapter
    if adapter is None:
        return
    facts = [f"{adapter.num_experts} experts"] if adapter.num_experts else []
    facts += [f"r={adapter.lora_rank}"] if adapter.lora_rank else []
    facts += [f"{adapter.strategy} on {len(adapter.ranks)} ranks"] if adapter.ranks else []
    render.print_line(f"Adapter: {adapter.path}, {', '.join([adapter.kind, *facts])}")
    if report.outcome is not None:
        render.print_line(f"  {with_flags(report.outcome)}")


def doctor(
    words: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="ADAPTER_OR_SHARDS",
            help="An adapter or a shard directory, local or remote, that is to be served; and, after --, the command "
            "that starts vLLM, as it is. Both are optional.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    data_parallel_size: opt.DataParallelSize = 1,
    enable_expert_parallel: opt.EnableExpertParallel = False,
    enable_eplb: opt.EnableEplb = False,
    fully_sharded_loras: opt.FullyShardedLoras = False,
    expert_placement_strategy: opt.ExpertPlacementStrategy = "linear",
    max_lora_rank: Annotated[
        int, typer.Option(metavar="R", min=1, help="vLLM's --max-lora-rank.")
    ] = 16,
    max_loras: Annotated[int, typer.Option(metavar="N", min=1, help="vLLM's --max-loras.")] = 1,
    model: opt.Model = None,
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", help="Also show each patch, and what was ignored."),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Say whether this adapter would be right in this vLLM with these flags.

    Run it in vLLM's own environment. The first line is the verdict: right; refused, if vLLM or the
    plugin would refuse it; or wrong, if the plugin would not work here. Exit code 5 unless it is right.
    """
    from lorashard.reports.doctor import run_doctor  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.survey import has_vllm  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.verdict import reach_verdict  # noqa: PLC0415

    path, command = _take_apart(words or [])
    if has_vllm():
        render.say("importing vLLM ...")
    report = run_doctor(
        path,
        command,
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        enable_eplb=enable_eplb,
        fully_sharded_loras=fully_sharded_loras,
        expert_placement_strategy=expert_placement_strategy,
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
    )
    if as_json:
        render.print_json(_with_flags({"verdict": reach_verdict(report)} | asdict(report)))
    else:
        _show(report, verbose=verbose)
    if not report.ok:
        count = len(report.problems)
        raise NotReadyError("1 problem found." if count == 1 else f"{count} problems found.")


def _take_apart(words: list[str]) -> tuple[str | None, list[str]]:
    """The adapter, if there is one, and the command. Click has dropped the `--` between them."""
    from lorashard.vllm_plugin.doctor.command import starts_command  # noqa: PLC0415

    if not words or starts_command(words):
        return None, words
    return words[0], words[1:]
