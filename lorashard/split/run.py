"""One adapter split, or found to be split already.

In: an adapter, a target, a `SplitRequest`. Out: a `SplitResult`, and the shard directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorashard.adapter.options import LoraBLayout, Orientation
from lorashard.progress import Progress
from lorashard.shards.directory import holds_only_shards
from lorashard.shards.expert_map import ExpertMap
from lorashard.shards.manifest import Manifest
from lorashard.shards.placement import Placement
from lorashard.split.pipeline import (
    PreparedSplit,
    SplitRequest,
    prepared_split,
    request_of,
    write_shards,
)
from lorashard.split.resume import find_finished_split
from lorashard.storage.remote import locate
from lorashard.storage.staging import check_target, clear_leftovers
from lorashard.uploading.contents import ShardsContent, Uploaded
from lorashard.uploading.survey import preview_upload
from lorashard.vllm_options import Strategy
from lorashard.writing.disk_space import check_disk_space

# "skipped": resume found the directory finished.
SplitStatus = Literal["done", "skipped"]


@dataclass(frozen=True, slots=True)
class SplitResult:
    """What a split wrote, found, or would write in a dry run.

    num_experts_inferred: the number of experts is the highest index in the adapter plus one, since
    nothing names it. counted_from_r: it is that of fused tensors by the config's r alone.
    file_sizes: bytes by file name, the replicated file first, then one for each ep rank.
    manifest: None in a dry run, and in a batch, where the tables of many adapters would pile up.
    out: the directory; or the URL to which it was uploaded, and `uploaded` says what that did.
    """

    adapter: str
    out: Path | str
    status: SplitStatus
    dry_run: bool
    num_experts: int
    num_experts_inferred: bool
    counted_from_r: bool
    num_modules: int
    placement: Placement
    file_sizes: Mapping[str, int]
    notes: tuple[str, ...]
    manifest: Manifest | None
    uploaded: Uploaded | None = None


def split_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    ep_size: int | SplitRequest,
    *,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    lora_b_layout: LoraBLayout | None = None,
    orientation: Orientation | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    sync: bool = True,
    force: bool = False,
    resume: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the shard directory `out`. It appears whole or not at all.

    adapter: a directory, or hf://owner/name[@revision] or another URL, which is streamed.
    ep_size: the number of expert-parallel ranks; or a SplitRequest, which has all of how to split.
    strategy ... sync: as SplitRequest and LayoutOptions have them.
    force: replace a finished shard directory. resume: keep `out` if it is finished and of the same
    adapter, placement and options.
    progress: called with source bytes done since the last call.
    Raises AdapterError, PlacementError or ShardError.
    """
    request = request_of(
        ep_size,
        strategy=strategy,
        expert_map=expert_map,
        model=model,
        num_experts=num_experts,
        lora_b_layout=lora_b_layout,
        orientation=orientation,
        dtype=dtype,
        allow_pickle=allow_pickle,
        sync=sync,
    )
    result = run_split(adapter, Path(out), request, force=force, resume=resume, progress=progress)
    assert result.manifest is not None, "only a dry run has none"
    return result.manifest


def run_split(
    adapter: str | os.PathLike[str],
    out: Path,
    request: SplitRequest,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    url: str | None = None,
    note: Callable[[str], None] = lambda _: None,
    started: Callable[[int], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> SplitResult:
    """Split one adapter; with `resume` only if needed, in a dry run only on paper.

    url: where `out`, a temporary directory, is going to be uploaded; what is there is what `force` and
    `resume` are about.
    note: called with each note, before any tensor data is read, or after a cast.
    started: called with the source's size in bytes before each pass over it.
    progress: called with bytes done since the last call.
    Raises AdapterError, PlacementError or ShardError.
    """
    place = locate(adapter)
    if not resume:  # fail before anything is read
        _check_free(out, url, request.ep_size, force=force)
    with prepared_split(place, request) as prepared:
        notes: list[str] = []

        def add_note(text: str) -> None:
            notes.append(text)
            note(text)

        for text in prepared.notes:
            add_note(text)
        manifest = None
        if resume:
            started(prepared.source.index.file_size)
            manifest = find_finished_split(url or out, prepared, request, progress)
        skipped = manifest is not None
        if resume:
            _check_free(out, url, request.ep_size, force=force or skipped)
        if manifest is None:
            size_bytes = sum(file.size_bytes for file in prepared.plan.files)
            check_disk_space(out, size_bytes)
        if skipped and not dry_run:
            clear_leftovers(out)
        if manifest is None and not dry_run:
            started(prepared.source.index.file_size)
            manifest = write_shards(
                prepared, out, request, force=force, progress=progress, note=add_note
            )
        return _describe(
            str(place), out, request, prepared, manifest, skipped, dry_run, tuple(notes)
        )


def _check_free(out: Path, url: str | None, ep_size: int, *, force: bool) -> None:
    """Raise OutputExistsError if something is in the way at the place where the shards go in the end."""
    if url is None:
        check_target(out, force=force, replaceable=holds_only_shards)
    else:
        preview_upload(url, ShardsContent(ep_size), force=force)


def _describe(
    adapter: str,
    out: Path,
    request: SplitRequest,
    prepared: PreparedSplit,
    manifest: Manifest | None,
    skipped: bool,
    dry_run: bool,
    notes: tuple[str, ...],
) -> SplitResult:
    layout = prepared.layout
    count_given = request.model is not None or request.options.num_experts is not None
    return SplitResult(
        adapter=adapter,
        out=out,
        status="skipped" if skipped else "done",
        dry_run=dry_run,
        num_experts=layout.num_experts,
        num_experts_inferred=layout.numbers_experts_only and not count_given,
        counted_from_r=layout.counted_from_r,
        num_modules=len(layout.modules),
        placement=prepared.placement,
        file_sizes={file.name: file.size_bytes for file in prepared.plan.files},
        notes=notes,
        manifest=manifest,
    )
