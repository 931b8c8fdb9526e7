"""`lorashard split`: adapters -> shard directories."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.error_json import json_of
from lorashard.cli.split_result import outcome_json, result_json, say_result
from lorashard.cli.split_to_url import refuse_for_url, split_to_url
from lorashard.errors import AdapterError, BatchError, ShardError
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.split.batch import AdapterOutcome
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
            help="Target directory; with several adapters, the directory for all of them. Or, for one "
            "adapter, where to upload it as `push` does: hf://owner/name or another URL. "
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
    private: Annotated[
        bool,
        typer.Option("--private", help="With -o hf://: if the repository is new, make it private."),
    ] = False,
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
    if out is not None and "://" in out:
        refuse_for_url(out, batch=batch, resume=resume)
        split_to_url(
            names[0], out, request, private=private, force=force, dry_run=dry_run,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    if private:
        raise ShardError(
            "--private is for -o hf://owner/name: a local directory has no such thing."
        )
    chosen = None if part is None else parse_part(part)
    if chosen is not None:
        check_names_are_fixed(names)
    jobs = plan_jobs(find_adapters(names), None if out is None else Path(out), ep_size, batch=batch)
    if chosen is not None:
        jobs = chosen.of(jobs)
    if batch:
        gc.enable()  # free what one adapter leaves behind before the next
        _split_batch(
            jobs, request, workers=workers, force=force, resume=resume, dry_run=dry_run,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip
    else:
        _split_one(
            jobs[0], request, force=force, resume=resume, dry_run=dry_run,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip


def _split_one(
    job: SplitJob,
    request: SplitRequest,
    *,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from lorashard.split.run import run_split  # noqa: PLC0415

    render.if_interrupted(lambda: f"{job.target} is as it was.")
    with bars.progress_bar(f"split {Path(job.adapter).name}", quiet=quiet) as bar:
        result = run_split(
            job.adapter,
            job.target,
            request,
            force=force,
            resume=resume,
            dry_run=dry_run,
            note=lambda text: render.say_note(text, quiet=quiet),
            started=bar.restart,
            progress=bar.advance,
        )
    say_result(result, quiet=quiet)
    render.print_result(result_json(result), result.out, as_json=as_json, quiet=quiet)


def _split_batch(
    jobs: Sequence[SplitJob],
    request: SplitRequest,
    *,
    workers: int,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Split all of them; report failures at the end. Raises BatchError if there are any."""
    from lorashard.split.batch import split_jobs  # noqa: PLC0415

    with bars.batch_bar("split", len(jobs), quiet=quiet) as bar:
        render.if_interrupted(
            lambda: (
                f"{bar.count.num_finished} of {len(jobs)} adapters are finished. The same command "
                "with --resume does the rest."
            )
        )

        def finished(outcome: AdapterOutcome) -> None:
            bar.finish(outcome.adapter)
            if outcome.error is not None:
                shown = json_of(outcome.error)
                render.say_error(_about(outcome.adapter, shown["error"]), shown["hint"])
            elif outcome.result is not None:
                say_result(outcome.result, quiet=quiet)
                if not (as_json or quiet):
                    render.print_line(str(outcome.result.out))

        outcomes = split_jobs(
            jobs,
            request,
            workers=workers,
            force=force,
            resume=resume,
            dry_run=dry_run,
            started=bar.start,
            progress=bar.advance,
            finished=finished,
        )
    _say_notes(outcomes, quiet=quiet)
    if as_json:
        render.print_json([outcome_json(outcome) for outcome in outcomes])
    counts = Counter(outcome.status for outcome in outcomes)
    ignored = f", {counts['ignored']} ignored as shards" if counts["ignored"] else ""
    render.say(
        f"{counts['done']} split, {counts['skipped']} already there, "
        f"{counts['failed']} failed{ignored}",
        quiet=quiet,
    )
    errors = []
    for outcome in outcomes:
        if outcome.error is not None:
            reason = with_flags(outcome.error.message)
            render.say(f"  failed: {_about(outcome.adapter, reason)}", quiet=quiet)
            errors.append(outcome.error)
    if errors:
        again = "Run it again with --resume to retry only those that failed."
        all_failed = "None was split; the messages above say why."
        hint = all_failed if len(errors) == len(outcomes) else again
        raise BatchError(errors, len(outcomes), noun="adapters", hint=hint)


def _say_notes(outcomes: Sequence[AdapterOutcome], *, quiet: bool) -> None:
    """Each note once, with the adapters that it is about."""
    about: dict[str, list[str]] = {}
    for outcome in outcomes:
        for note in outcome.result.notes if outcome.result is not None else ():
            about.setdefault(note, []).append(outcome.adapter)
    for note, adapters in about.items():
        others = f" and {len(adapters) - 1} more" if len(adapters) > 1 else ""
        render.say_note(note, about=adapters[0] + others, quiet=quiet)


def _about(adapter: str, text: str) -> str:
    """The text with the adapter's name before it, if it does not name it."""
    is_named = text.startswith((f"{adapter}:", f"{adapter}/", f"{adapter} "))
    return text if is_named else f"{adapter}: {text}"
