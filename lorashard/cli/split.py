"""`split` and `merge`: one core call each, with progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.read import is_plain_adapter
from lorashard.cli import render
from lorashard.errors import AdapterError, BatchError
from lorashard.merge import merge_shards
from lorashard.progress import Progress
from lorashard.shards.directory import has_manifest, is_shard_directory, read_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.replan import source_was_pickled
from lorashard.split.jobs import Job, find_adapters, names_several, plan_jobs, read_list
from lorashard.split.pipeline import SplitRequest, prepared_split, write_shards
from lorashard.split.resume import is_already_split
from lorashard.storage.parallel import Outcome, run_concurrently
from lorashard.storage.remote import local_copy, locate
from lorashard.storage.staging import check_target


def chosen_jobs(
    named: Sequence[str], listed: Iterable[str] | None, out: Path | None, ep_size: int
) -> tuple[tuple[Job, ...], bool]:
    """The adapters that were named with their targets, and whether they are a batch."""
    if listed is not None:
        named = [*named, *read_list(listed)]
    if not named:
        raise AdapterError("No adapter is named.", hint="lorashard split ADAPTER --ep-size N")
    several = listed is not None or names_several(named)
    return plan_jobs(find_adapters(named), out, ep_size, several=several), several


def run_split(
    job: Job,
    request: SplitRequest,
    *,
    force: bool,
    resume: bool,
    dry_run: bool,
    quiet: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Split one adapter, or say what would happen; returns what `--json` prints.

    progress: of a batch, which has a bar of its own. There, shards among the adapters are ignored:
    they are what `runs/*` finds the second time.
    """
    out, adapter = job.target, locate(job.adapter)
    if progress is not None and has_manifest(adapter):
        return {"adapter": job.adapter, "status": "ignored", "out": None}
    if not resume:
        check_target(out, force=force, replaceable=is_shard_directory)
    with prepared_split(adapter, request) as prepared:
        for note in prepared.notes:
            render.say(f"note: {note}", quiet=quiet)
        placement, plan = prepared.placement, prepared.plan
        total = prepared.source.index.file_size
        silent = quiet or progress is not None
        with render.progress_bar(f"split {adapter.name}", total, quiet=silent) as bar:
            skip = resume and is_already_split(out, prepared, request, progress or bar)
        check_target(out, force=force or skip, replaceable=is_shard_directory)
        if not (dry_run or skip):
            with render.progress_bar(f"split {adapter.name}", total, quiet=silent) as bar:
                write_shards(prepared, out, request, force=force, progress=progress or bar)
        sizes = [file.size_bytes for file in plan.files]
        told = request.model is not None or request.options.num_experts is not None
        counted = prepared.layout.numbers_experts_only and not told
        remark = " (dry run, nothing written)" if dry_run else ""
        render.say(
            f"{adapter}: {prepared.layout.num_experts} experts"
            f"{' (counted; --model checks it)' if counted else ''} in "
            f"{len(prepared.layout.modules)} modules on {placement.ep_size} ranks, "
            f"{render.size(sizes[0])} replicated + {render.size(max(sizes[1:]))} per rank"
            + (" (already there)" if skip else remark),
            quiet=quiet,
        )
        return {
            "adapter": str(adapter),
            "status": "skipped" if skip else "done",
            "out": str(out),
            "dry_run": dry_run,
            "num_experts": prepared.layout.num_experts,
            "num_modules": len(prepared.layout.modules),
            "placement": placement.strategy,
            "ep_size": placement.ep_size,
            "ranks": [list(experts) for experts in placement.ranks],
            "files": {file.name: file.size_bytes for file in plan.files},
            "notes": list(prepared.notes),
        }


def run_batch(
    jobs: Sequence[Job],
    request: SplitRequest,
    *,
    workers: int,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Split all; what cannot be split is told in the end. Raises BatchError."""
    with render.count_bar("split", len(jobs), quiet=quiet) as advance:

        def work(job: Job, progress: Progress) -> dict[str, Any]:
            return run_split(
                job, request, force=force, resume=resume, dry_run=dry_run, quiet=quiet,
                progress=progress,
            )  # fmt: skip

        def finished(outcome: Outcome[Job, dict[str, Any]]) -> None:
            advance(1)
            if outcome.error is not None:
                render.say(f"error: {outcome.error}")
            elif outcome.result and outcome.result["out"] and not (as_json or quiet):
                render.print_line(outcome.result["out"])

        outcomes = run_concurrently(jobs, work, workers=workers, finished=finished)
    if as_json:
        render.print_json([_describe(outcome) for outcome in outcomes])
    statuses = Counter(outcome.result["status"] for outcome in outcomes if outcome.result)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    ignored = f", {statuses['ignored']} ignored as shards" if statuses["ignored"] else ""
    render.say(
        f"{statuses['done']} split, {statuses['skipped']} already there, {len(failed)} failed{ignored}",
        quiet=quiet,
    )
    for outcome in failed:
        render.say(f"  failed: {outcome.job.adapter}", quiet=quiet)
    if failed:
        raise BatchError([o.error for o in failed if o.error is not None], len(outcomes))


def _describe(outcome: Outcome[Job, dict[str, Any]]) -> dict[str, Any]:
    if outcome.error is None:
        return outcome.result or {}
    return {
        "adapter": outcome.job.adapter,
        "status": "failed",
        "out": str(outcome.job.target),
        "error": outcome.error.message,
        "hint": outcome.error.hint,
        "exit_code": outcome.error.exit_code,
    }


def run_merge(shards: str, out: Path, *, force: bool, quiet: bool) -> dict[str, Any]:
    """Merge shards back; returns what `--json` prints."""
    place = locate(shards)
    manifest = read_manifest(place)
    weights = manifest.source.files[WEIGHTS_NAME]
    check_target(out, force=force, replaceable=is_plain_adapter)
    with (
        local_copy(place, (MANIFEST_NAME, CONFIG_NAME, *manifest.files)) as directory,
        render.progress_bar(f"merge {place.name}", weights.size_bytes, quiet=quiet) as progress,
    ):
        merge_shards(directory, out, force=force, progress=progress)
    if source_was_pickled(manifest):
        render.say(
            f"note: the source was a pickle; its tensors are given back as {WEIGHTS_NAME}.",
            quiet=quiet,
        )
    return {
        "shards": shards,
        "out": str(out),
        "size": weights.size_bytes,
        "blake3": weights.blake3,
    }
