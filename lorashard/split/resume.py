"""Whether a shard directory is what a split would write: then there is nothing left to do."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.errors import LorashardError
from lorashard.progress import Progress
from lorashard.shards.directory import check_file, read_manifest
from lorashard.shards.manifest import Manifest, has_files_of
from lorashard.split.pipeline import PreparedSplit, SplitRequest
from lorashard.storage.digests import digest_of


def is_already_split(
    target: Path, prepared: PreparedSplit, request: SplitRequest, progress: Progress
) -> bool:
    """Whether `target` is finished, and of this adapter, placement and options.

    A commit on the Hub says which adapter it is; of any other the bytes are read and digested.
    """
    try:
        manifest = read_manifest(target)
        for name, recorded in manifest.files.items():
            check_file(target / name, recorded)
    except LorashardError:
        return False
    return _is_as_asked(manifest, prepared, request) and _has_source(manifest, prepared, progress)


def _is_as_asked(manifest: Manifest, prepared: PreparedSplit, request: SplitRequest) -> bool:
    asked = (request.stored_dtype, prepared.options, prepared.placement)
    found = (manifest.dtype, manifest.options, manifest.placement)
    return found == asked and has_files_of(manifest, prepared.plan)


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
