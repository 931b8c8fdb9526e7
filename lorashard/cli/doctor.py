"""`doctor`: what the vLLM plugin finds here, and would do with these flags and this adapter.

`vllm_plugin.doctor` looks and decides; this prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import NotReadyError

if TYPE_CHECKING:
    from lorashard.vllm_plugin.doctor.diagnosis import Report
    from lorashard.vllm_plugin.doctor.findings import PatchState
    from lorashard.vllm_plugin.doctor.flags import EngineFlags


def run_doctor(path: Path | None, flags: EngineFlags, model: str | None, *, as_json: bool) -> None:
    """Look, decide, print. Raises NotReadyError if anything is broken or would be refused."""
    from lorashard.adapter.base_model import merge_facts  # noqa: PLC0415
    from lorashard.adapter.options import LayoutOptions  # noqa: PLC0415
    from lorashard.adapter.read import read_model_facts  # noqa: PLC0415
    from lorashard.storage.remote import locate  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.diagnosis import diagnose  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.survey import has_vllm, survey  # noqa: PLC0415
    from lorashard.vllm_plugin.doctor.vllm_config import find_config_refusal  # noqa: PLC0415

    facts = read_model_facts(locate(model)) if model else None
    if has_vllm():
        render.say("importing vLLM ...")
    installation, patches = survey()
    adapter = None
    if path is not None:
        options = merge_facts(LayoutOptions(), facts)
        adapter = survey_adapter(path, options, expert_parallel=flags.ep_size > 1)
        refusal = find_config_refusal(path, is_shards=adapter.is_shard_directory)
        adapter = replace(adapter, vllm_refusal=refusal)
    report = diagnose(installation, patches, flags, facts, adapter)
    if as_json:
        render.print_json(asdict(report))
    else:
        _show(report)
    if not report.ok:
        count, first = len(report.problems), _lines(report.problems[0].text)[0]
        raise NotReadyError(f"{count} problem{'' if count == 1 else 's'}: {first}")


def _lines(problem: str) -> list[str]:
    """What is wrong, and the hint, if there is one. Other newlines are of a name, and are escaped."""
    text, newline, hint = problem.rpartition("\n  ")
    return [text, f"  {hint}"] if newline else [hint]


def _show(report: Report) -> None:
    _show_installation(report)
    _show_patches(report.patches)
    _show_engine(report)
    _show_adapter(report)
    render.print_line("")
    for note in report.notes:
        render.print_line(f"note: {note}")
    for problem in report.problems:
        for line in _lines(f"problem: {problem.text}"):
            render.print_line(line)
    if report.ok:
        render.print_line("ok: nothing is broken, and nothing would be refused")


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


def _show_engine(report: Report) -> None:
    render.print_line("")
    render.print_line(
        f"Engine: {report.ep_size} expert-parallel ranks, experts placed {report.placement}"
        if report.ep_size > 1
        else "Engine: no expert parallelism (-tp N --enable-expert-parallel)"
    )
    if report.known_once_loaded:
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
    render.print_line("")
    render.print_line(f"Adapter: {adapter.path}, {', '.join([adapter.kind, *facts])}")
    if report.outcome is not None:
        render.print_line(f"  {report.outcome}")


def doctor(
    path: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="ADAPTER_OR_SHARDS",
            help="An adapter or a shard directory that is to be served; optional.",
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
    as_json: opt.Json = False,
) -> None:
    """Show what the vLLM plugin finds here, and would do with this adapter and these flags.

    Run it in vLLM's own environment. Exit code 5 if anything is broken or would be refused.
    """
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
    run_doctor(path, flags, model, as_json=as_json)
