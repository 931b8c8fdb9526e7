"""A finished shard directory -> a repository on the Hub, or a folder at another URL.

In: a local directory, whose digests are proven first, and a target. Out: the same files there, and a
model card.
"""

from __future__ import annotations

import os
from pathlib import Path

from lorashard.errors import VerificationError
from lorashard.progress import Progress, Stage
from lorashard.shards.directory import read_manifest
from lorashard.shards.held import find_partial
from lorashard.uploading.contents import Uploaded
from lorashard.uploading.survey import is_on_hub
from lorashard.uploading.upload import upload_shards
from lorashard.verify.verify import verify_shards
from lorashard.writing.restore import proof_bytes


def push_shards(
    shards: str | os.PathLike[str],
    target: str,
    *,
    private: bool = False,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = lambda *_: None,
    progress: Progress = lambda _: None,
) -> Uploaded:
    """Prove the shard directory `shards` against its digests, and upload it with a model card.

    target: hf://owner/name[@branch][/folder], created if it does not exist, or another URL.
    private: make a repository that is created private. force: replace shards at a URL; on the Hub
    the history keeps the old ones. dry_run: prove the directory, look at the target, upload nothing.
    progress: called with the bytes done since the last call: those checked, then those uploaded; to
    the Hub only those checked, since huggingface_hub shows its own. stage: called as "check" or "upload"
    begins, with the bytes that it is going to report.
    Raises ShardError, or AdapterError for a place that does not answer or refuses access.
    """
    shards = Path(shards)
    manifest = read_manifest(shards)
    if (partial := find_partial(manifest, shards)) is not None:
        raise partial
    size_bytes = sum(file.digest.size_bytes for file in manifest.files.values())
    stage("check", size_bytes + proof_bytes(manifest))
    if findings := verify_shards(shards, progress=progress):
        raise VerificationError(shards, findings)
    if not dry_run:
        stage("upload", 0 if is_on_hub(target) else size_bytes)
    return upload_shards(
        shards, manifest, target, private=private, force=force, dry_run=dry_run, progress=progress
    )
