"""`split` and `merge`: one core call each, with progress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorashard.adapter import CONFIG_NAME, WEIGHTS_NAME
from lorashard.cli import render
from lorashard.errors import ShardError
from lorashard.manifest import MANIFEST_NAME
from lorashard.merge import is_plain_adapter, merge_shards, source_was_pickled
from lorashard.output import check_target
from lorashard.pipeline import (
    SplitRequest,
    is_shard_directory,
    prepared_split,
    read_manifest,
    write_shards,
)
from lorashard.remote import Place, RemoteFolder, local_copy, locate


def targets(
    adapters: list[str], out: Path | None, ep_size: int, *, force: bool
) -> list[tuple[Place, Path]]:
    """Each adapter with its target: OUT, OUT/NAME-epN for several, or ADAPTER-epN beside it.

    A remote one's is in the current directory.

    Raises ShardError if two adapters would have the same target, or one is in the way: before
    any of them is written.
    """
    places = [locate(adapter) for adapter in adapters]
    if out is not None and len(places) == 1:
        return [(places[0], out)]
    jobs: list[tuple[Place, Path]] = []
    for adapter in places:
        remote = isinstance(adapter, RemoteFolder)
        beside = Path(adapter.name if remote else os.path.abspath(str(adapter)))
        jobs.append((adapter, (out or beside.parent) / f"{beside.name}-ep{ep_size}"))
    taken: dict[Path, Place] = {}
    for adapter, target in jobs:
        if target in taken:
            raise ShardError(
                f"{taken[target]} and {adapter} would both be written to {target}.",
                hint="Run them one by one, each with its own -o.",
            )
        taken[target] = adapter
        check_target(target, force=force, replaceable=is_shard_directory)
    return jobs


def run_split(
    adapter: Place, out: Path, request: SplitRequest, *, force: bool, dry_run: bool, quiet: bool
) -> dict[str, Any]:
    """Split one adapter, or say what would happen; returns what `--json` prints."""
    check_target(out, force=force, replaceable=is_shard_directory)
    with prepared_split(adapter, request) as prepared:
        for note in prepared.notes:
            render.say(f"note: {note}", quiet=quiet)
        placement, plan = prepared.placement, prepared.plan
        total = prepared.source.index.file_size
        if not dry_run:
            with render.progress_bar(f"split {adapter.name}", total, quiet=quiet) as progress:
                write_shards(prepared, out, request, force=force, progress=progress)
        sizes = [file.size_bytes for file in plan.files]
        told = request.model is not None or request.options.num_experts is not None
        counted = prepared.layout.numbers_experts_only and not told
        render.say(
            f"{adapter}: {prepared.layout.num_experts} experts"
            f"{' (counted; --model checks it)' if counted else ''} in "
            f"{len(prepared.layout.modules)} modules on {placement.ep_size} ranks, "
            f"{render.size(sizes[0])} replicated + {render.size(max(sizes[1:]))} per rank"
            + (" (dry run, nothing written)" if dry_run else ""),
            quiet=quiet,
        )
        return {
            "adapter": str(adapter),
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
