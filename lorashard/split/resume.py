"""Whether a shard directory is already what a split would write.

In: a target and a `PreparedSplit`. Out: the manifest of the finished directory, or None.
"""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.errors import LorashardError
from lorashard.progress import Progress
from lorashard.shards.describe import differing_files
from lorashard.shards.directory import check_file, has_digest, read_manifest
from lorashard.shards.manifest import Manifest
from lorashard.shards.replan import find_contradictions, rebuild_plan
from lorashard.split.pipeline import PreparedSplit, SplitRequest
from lorashard.storage.digests import digest_of


def find_finished_split(
    target: Path, prepared: PreparedSplit, request: SplitRequest, progress: Progress
) -> Manifest | None:
    """The manifest of `target` if it is finished and of this adapter, placement and options.

    On the Hub, the commit identifies the adapter; any other adapter is read and digested. So are the
    shards, to see damage.
    progress: called with source bytes digested since the last call.
    """
    try:
        manifest = read_manifest(target)
        for name, recorded in manifest.files.items():
            check_file(target / name, recorded)
    except LorashardError:
        return None
    if (
        _has_same_plan(manifest, prepared, request)
        and _has_source(manifest, prepared, progress)
        and _follows_from_source(target, manifest, prepared)
        and _is_undamaged(target, manifest)
    ):
        return manifest
    return None


def _follows_from_source(target: Path, manifest: Manifest, prepared: PreparedSplit) -> bool:
    """Whether every command would take the manifest: its scaling, its ranks, its order of rows."""
    try:
        rebuilt = rebuild_plan(manifest, prepared.source.config_bytes, target)
    except LorashardError:
        return False
    return next(find_contradictions(manifest, rebuilt), None) is None


def _is_undamaged(target: Path, manifest: Manifest) -> bool:
    files = {name: file.digest for name, file in manifest.files.items()}
    files[CONFIG_NAME] = manifest.source.files[CONFIG_NAME]
    return all(has_digest(target / name, digest) for name, digest in files.items())


def _has_same_plan(manifest: Manifest, prepared: PreparedSplit, request: SplitRequest) -> bool:
    wanted = (request.stored_dtype, prepared.options, prepared.placement)
    recorded = (manifest.dtype, manifest.options, manifest.placement)
    return recorded == wanted and not differing_files(manifest, prepared.plan)


def _has_source(manifest: Manifest, prepared: PreparedSplit, progress: Progress) -> bool:
    source, recorded = prepared.source, manifest.source
    if recorded.header != source.header:
        return False
    if recorded.files[CONFIG_NAME].blake3 != blake3(source.config_bytes).hexdigest():
        return False
    if source.revision is not None and (source.repo, source.revision) == (
        recorded.repo, recorded.revision,
    ):  # fmt: skip
        return True
    begin, end = len(source.header), source.index.file_size
    with source.opened() as weights:
        digest = digest_of(weights, begin, end, progress, prefix=source.header)
    return digest == recorded.files[WEIGHTS_NAME].blake3
