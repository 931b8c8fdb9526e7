"""`lorashard split`: adapters -> shard directories."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.split_batch import split_batch
from lorashard.cli.split_result import result_json, say_result
from lorashard.cli.upload import again_of, is_url, refuse_private, say_changes, shown_stages
from lorashard.errors import AdapterError

if TYPE_CHECKING:
    from lorashard.split.pipeline import SplitRequest
    from lorashard.split.selection import SplitJob


def split(
    ep_size: opt.EpSize,
    adapters: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="ADAPTER",
            help="PEFT adapters: directories, hf://owner/name[@revision], other URLs, patterns such "
            "as 'runs/*', or a Hub collection, hf://collections/owner/name.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[str],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory; with several adapters, the directory for all of them. Or where to "
            "upload the shards as `push` does: hf://owner/name or another URL. "
            "[default: ADAPTER-epN; for checkpoint-130, epN-of-checkpoint-130]",
            show_default=False,
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    dtype: opt.Dtype = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    force: opt.Force = False,
    private: opt.Private = False,
    listed: Annotated[
        Optional[typer.FileText],
        typer.Option(
            "--from",
            metavar="FILE",
            encoding="utf-8",
            errors="surrogateescape",  # a name that is not UTF-8 is still a name
            help="A file with one adapter per line; - is stdin.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        Optional[str],
        typer.Option(
            "--part",
            metavar="I/N",
            help="Split only part I of N of the adapters, from 0/N on: for N machines that are given the "
            "same list.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", metavar="N", min=1, help="How many adapters to split at once."),
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep a directory that is finished and of the same adapter."),
    ] = False,
    dry_run: opt.DryRun = False,
    no_sync: Annotated[
        bool,
        typer.Option(
            "--no-sync",
            help="Do not wait until the disk has the shards. For a volume that does not outlive a "
            "crash of the machine anyway.",
        ),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Split adapters into one file per expert-parallel rank."""
    from lorashard.split.parts import parse_part  # noqa: PLC0415
    from lorashard.split.selection import (  # noqa: PLC0415
        check_names_are_fixed,
        find_adapters,
        is_batch,
        plan_jobs,
        read_list,
    )

    request = opt.split_request(
        ep_size=ep_size,
        placement=placement,
        expert_map=expert_map,
        model=model,
        num_experts=num_experts,
        lora_b_layout=lora_b_layout,
        orientation=orientation,
        dtype=dtype,
        allow_pickle=allow_pickle,
        sync=not no_sync,
    )
    names = [*(adapters or ()), *(read_list(listed) if listed is not None else ())]
    if not names:
        raise AdapterError("No adapter is named.", hint="lorashard split ADAPTER --ep-size N")
    batch = listed is not None or part is not None or is_batch(names)
    refuse_private(out, private=private)
    chosen = None if part is None else parse_part(part)
    if chosen is not None:
        check_names_are_fixed(names)
    target = Path(out) if out is not None and not is_url(out) else out
    jobs = plan_jobs(find_adapters(names), target, ep_size, batch=batch)
    if chosen is not None:
        jobs = chosen.of(jobs)
    if batch:
        gc.enable()  # free what one adapter leaves behind before the next
        split_batch(
            jobs, request, url=out if is_url(out) else None, private=private, workers=workers,
            force=force, resume=resume, dry_run=dry_run, as_json=as_json, quiet=quiet,
        )  # fmt: skip
    else:
        _split_one(
            jobs[0], request, private=private, force=force, resume=resume, dry_run=dry_run,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip


def _split_one(
    job: SplitJob,
    request: SplitRequest,
    *,
    private: bool,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from lorashard.split.run import run_split  # noqa: PLC0415

    render.if_interrupted(lambda: f"{job.target} is as it was.")
    name = Path(job.adapter).name

    def note(text: str) -> None:
        render.say_note(text, quiet=quiet)

    if isinstance(job.target, Path):
        with bars.progress_bar(f"split {name}", quiet=quiet) as bar:
            result = run_split(
                job.adapter, job.target, request, force=force, resume=resume, dry_run=dry_run,
                note=note, started=bar.restart, progress=bar.advance,
            )  # fmt: skip
    else:
        from lorashard.to_url import UrlOutput, split_to_url  # noqa: PLC0415
        from lorashard.uploading.contents import ShardsContent  # noqa: PLC0415

        output = UrlOutput(job.target, ShardsContent(request.ep_size), private, force)
        output.check()
        with bars.progress_bar(f"split {name}", quiet=quiet) as bar:
            stage = shown_stages(
                bar, name, output.url, output.content.last, again_of(output), quiet=quiet
            )
            result = split_to_url(
                job.adapter, output, request, resume=resume, dry_run=dry_run, note=note, stage=stage,
                progress=bar.advance,
            )  # fmt: skip
    say_changes(result.uploaded, dry_run=dry_run, quiet=quiet)
    say_result(result, quiet=quiet)
    render.print_result(result_json(result), result.out, as_json=as_json, quiet=quiet)
