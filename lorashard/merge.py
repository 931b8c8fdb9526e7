"""`lorashard merge`: a shard directory -> the source adapter, bit for bit.

This is the split plan run backwards: the manifest keeps the source's header, so the same pure stages
give the same plan, whose reads say where each source byte is now. The digest of the result must be
the one that `split` recorded.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.read import is_plain_adapter
from lorashard.errors import ShardError, VerificationError
from lorashard.progress import Progress
from lorashard.shards.directory import (
    Shards,
    local_shards,
    locate_shards,
    opened_files,
)
from lorashard.shards.manifest import Manifest
from lorashard.shards.replan import CheckedShards, check_shards
from lorashard.storage.local import SequentialWriter, write_new
from lorashard.storage.staging import check_target, staged_directory
from lorashard.storage.syscalls import reserve
from lorashard.writing.disk_space import check_disk_space
from lorashard.writing.restore import restore_source


def merge_shards(
    shards: Shards,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the adapter that `shards` was split from into the directory `out`.

    shards: a directory, or hf://owner/name[@revision] or another URL, which is fetched first.
    progress: called with source bytes done since the last call.
    Raises ShardError if the shards were cast, or are no longer what `split` wrote, AdapterError if
    a remote place does not answer.
    """
    located, out = locate_shards(shards), Path(out)
    if located.manifest.dtype is not None:
        raise ShardError(
            f"{located.place}: the values were cast to {located.manifest.dtype}, so the source "
            "cannot be restored bit for bit.",
            hint="Split without `dtype` to be able to merge.",
        )
    check_target(out, force=force, replaceable=is_plain_adapter)
    check_disk_space(out, located.manifest.source.files[WEIGHTS_NAME].size_bytes)
    with local_shards(located) as directory:
        checked = check_shards(replace(located, place=directory))
        _write_adapter(checked, out, force=force, progress=progress)
    return located.manifest


def _write_adapter(shards: CheckedShards, out: Path, *, force: bool, progress: Progress) -> None:
    with staged_directory(
        out, last=CONFIG_NAME, force=force, replaceable=is_plain_adapter
    ) as staging:
        digest = _write_weights(shards, staging / WEIGHTS_NAME, progress)
        expected = shards.manifest.source.files[WEIGHTS_NAME].blake3
        if digest != expected:
            raise VerificationError(
                str(shards.place),
                (f"merged {WEIGHTS_NAME} has BLAKE3 {digest}, the source had {expected}",),
            )
        write_new(staging / CONFIG_NAME, shards.config_bytes)


def _write_weights(shards: CheckedShards, path: Path, progress: Progress) -> str:
    """Write the source's weights file; returns its BLAKE3 in hex."""
    source = shards.manifest.source
    header = source.header
    with opened_files(shards.files) as files, path.open("xb", buffering=0) as out:
        reserve(out.fileno(), source.files[WEIGHTS_NAME].size_bytes)
        writer = SequentialWriter(out.fileno())
        writer.write(memoryview(header))
        digest = restore_source(shards.plan, header, files, writer.write, progress)
        os.fsync(out.fileno())
    return digest
