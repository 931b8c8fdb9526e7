"""Whether a shard directory is already what a split would write.

In: a target, here or elsewhere, and a `PreparedSplit`. Out: the manifest of the finished directory, or
None.
"""

from __future__ import annotations

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.errors import LorashardError
from lorashard.progress import Progress
from lorashard.shards.describe import differing_files
from lorashard.shards.directory import (
    LocatedShards,
    find_file,
    find_files,
    has_digest,
    locate_shards,
)
from lorashard.shards.manifest import Manifest
from lorashard.shards.replan import find_contradictions, rebuild_plan
from lorashard.split.pipeline import PreparedSplit, SplitRequest
from lorashard.storage.digests import digest_of
from lorashard.storage.remote import Location, RemoteFolder


def find_finished_split(
    target: str | Location, prepared: PreparedSplit, request: SplitRequest, progress: Progress
) -> Manifest | None:
    """The manifest of `target` if it is finished and of this adapter, placement and options.

    On the Hub, the commit identifies the adapter; any other adapter is read and digested. So are local
    shards, to see damage; of those elsewhere only the sizes are looked at.
    progress: called with source bytes digested since the last call.
    """
    try:
        shards = locate_shards(target)
        find_files(shards)
    except LorashardError:
        return None
    if (
        _has_same_plan(shards.manifest, prepared, request)
        and _has_source(shards.manifest, prepared, progress)
        and _follows_from_source(shards, prepared)
        and _is_undamaged(shards)
    ):
        return shards.manifest
    return None


def _follows_from_source(shards: LocatedShards, prepared: PreparedSplit) -> bool:
    """Whether every command would take the manifest: its scaling, its ranks, its order of rows."""
    try:
        rebuilt = rebuild_plan(shards.manifest, prepared.source.config_bytes, shards.place)
    except LorashardError:
        return False
    return next(find_contradictions(shards.manifest, rebuilt), None) is None


def _is_undamaged(shards: LocatedShards) -> bool:
    place, manifest = shards.place, shards.manifest
    config = manifest.source.files[CONFIG_NAME]
    if isinstance(place, RemoteFolder):
        try:
            find_file(place, CONFIG_NAME, config)
        except LorashardError:
            return False
        return True
    files = {name: file.digest for name, file in manifest.files.items()} | {CONFIG_NAME: config}
    return all(has_digest(place / name, digest) for name, digest in files.items())


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
