"""`doctor`: what the vLLM plugin finds here, and would do with these flags and this adapter.

`vllm_plugin.doctor` looks and decides; this prints.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import LorashardError, NotReadyError
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.adapter.base_model import ModelFacts
    from lorashard.adapter.options import LayoutOptions
    from lorashard.storage.remote import Location
    from lorashard.vllm_plugin.doctor.command import VllmCommand
    from lorashard.vllm_plugin.doctor.diagnosis import Report
    from lorashard.vllm_plugin.doctor.findings import PatchState, SurveyedAdapter
    from lorashard.vllm_plugin.doctor.flags import EngineFlags


def run_doctor(
    path: str | None,
    flags: EngineFlags,
    model: str | None,
    command: VllmCommand | None,
    *,
    as_json: bool,
    verbose: bool,
) -> None:
    """Look, decide, print. Raises NotReadyError if anything is broken or would be refused."""
    from lorashard.adapter.base_model import merge_facts  # noqa: PLC0415
    from lorashard.adapter.options import LayoutOptions  # noqa: PLC0415
    from lorashard.storage.remote import locate  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.diagnosis import diagnose  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.problems import lora_problems  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.survey import has_vllm, survey  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.verdict import reach_verdict  # noqa: PLC0415

    notes: list[str] = []
    facts = _read_model(model, command, notes)
    is_chosen = path is None and command is not None
    if path is None and command is not None:
        path = _choose_adapter(command, notes)
    if has_vllm():
        render.say("importing vLLM ...")
    installation, patches = survey()
    adapter = None
    if path is not None:
        options = merge_facts(LayoutOptions(), facts)
        try:
            adapter = _survey(locate(path), options, expert_parallel=flags.ep_size > 1)
        except LorashardError as err:
            if not is_chosen:
                raise
            notes.append(f"{path} of --lora-modules was not looked at: {err.message}")
    report = diagnose(installation, patches, flags, facts, adapter)
    if command is not None:
        problems = (*report.problems, *lora_problems(enable_lora=command.enable_lora))
        found = (*report.notes, *command.notes, *notes)
        report = replace(report, ok=not problems, problems=problems, notes=found)
    ignored = () if command is None else command.ignored
    if as_json:
        verdict = {"verdict": reach_verdict(report)}
        render.print_json(_with_flags(verdict | asdict(report)) | {"ignored": list(ignored)})
    else:
        _show(report, ignored, verbose=verbose)
    if not report.ok:
        count = len(report.problems)
        raise NotReadyError("1 problem found." if count == 1 else f"{count} problems found.")


def _survey(place: Location, options: LayoutOptions, *, expert_parallel: bool) -> SurveyedAdapter:
    """What a place holds. Of a remote one, its headers are fetched."""
    from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.outline import local_outline  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.vllm_config import find_config_refusal  # noqa: PLC0415

    with local_outline(place) as path:
        adapter = survey_adapter(path, options, expert_parallel=expert_parallel)
        refusal = find_config_refusal(path, is_shards=adapter.is_shard_directory)

    def named(text: str | None) -> str | None:
        return None if text is None else text.replace(str(path), str(place))

    summary = replace(adapter.summary, path=str(place), error=named(adapter.summary.error))
    return replace(adapter, summary=summary, vllm_refusal=named(refusal))


def _read_model(
    model: str | None, command: VllmCommand | None, notes: list[str]
) -> ModelFacts | None:
    """The facts of --model, or of the model that the command serves, where that can be read."""
    from lorashard.adapter.read import read_model_facts  # noqa: PLC0415
    from lorashard.storage.remote import locate  # noqa: PLC0415

    if model is not None:
        return read_model_facts(locate(model))
    if command is None or command.model is None:
        return None
    try:
        return read_model_facts(locate(command.model))
    except LorashardError as err:
        notes.append(f"The model was not looked at: {err.message}")
        return None


def _choose_adapter(command: VllmCommand, notes: list[str]) -> str | None:
    """The first local adapter of --lora-modules, or the first one on the Hub."""
    from lorashard.storage.remote import is_remote  # noqa: PLC0415

    local = [name for name in command.adapters if Path(name).exists()]
    chosen = next(iter([*local, *filter(is_remote, command.adapters)]), None)
    notes += [
        f"{name} of --lora-modules was not looked at."
        for name in command.adapters
        if name != chosen
    ]
    return chosen


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


def _show(report: Report, ignored: Sequence[str], *, verbose: bool) -> None:
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
    if verbose and ignored:
        render.print_line("")
        render.print_line("Ignored, since expert LoRA does not depend on it")
        for words in ignored:
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
    max_lora_rank: Annotated[int, typer.Option(min=1, help="vLLM's --max-lora-rank.")] = 16,
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
    from lorashard.vllm_plugin.doctor.command import parse_command  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.flags import EngineFlags  # noqa: PLC0415

    flags = EngineFlags(
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        enable_eplb=enable_eplb,
        fully_sharded_loras=fully_sharded_loras,
        expert_placement_strategy=expert_placement_strategy,
        max_lora_rank=max_lora_rank,
    )
    path, command_words = _take_apart(words or [])
    command = None
    if command_words:
        command = parse_command(command_words, flags)
        flags = command.flags
        os.environ.update(command.environment)
    run_doctor(path, flags, model, command, as_json=as_json, verbose=verbose)


def _take_apart(words: list[str]) -> tuple[str | None, list[str]]:
    """The adapter, if there is one, and the command. Click has dropped the `--` between them."""
    from lorashard.vllm_plugin.doctor.command import starts_command  # noqa: PLC0415

    if not words or starts_command(words):
        return None, words
    return words[0], words[1:]
