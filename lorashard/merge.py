"""`lorashard merge`: a shard directory -> the source adapter, bit for bit.

This is the split plan run backwards: the manifest keeps the source's header, so the same pure stages
give the same plan, whose reads say where each source byte is now. The digest of the result must be
the one that `split` recorded.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.read import is_plain_adapter
from lorashard.errors import ShardError, VerificationError
from lorashard.progress import Progress
from lorashard.shards.directory import (
    LocatedShards,
    Shards,
    local_shards,
    locate_shards,
    opened_files,
)
from lorashard.shards.manifest import Manifest
from lorashard.shards.replan import CheckedShards, check_shards
from lorashard.storage.local import ByteSource, write_synced
from lorashard.storage.staging import check_target, staged_directory
from lorashard.writing.blocks import BLOCK_BYTES, Block, CopyBlock, split_into_blocks
from lorashard.writing.rearrange import restore_block, scratch_bytes, slot_views


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
            hint="Split without --dtype to be able to merge.",
        )
    check_target(out, force=force, replaceable=is_plain_adapter)
    with local_shards(located) as directory:
        checked = check_shards(LocatedShards(directory, located.manifest))
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
        write_synced(staging / CONFIG_NAME, shards.config_bytes)


def _write_weights(shards: CheckedShards, path: Path, progress: Progress) -> str:
    """Write the source's weights file; returns its BLAKE3 in hex."""
    header = shards.manifest.source.header
    digest = blake3(header)
    with opened_files(shards.files) as files, path.open("xb") as out:
        out.write(header)
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        for block in split_into_blocks(shards.plan.reads):
            size = block.end - block.begin
            if len(buffer) < size:
                buffer = mmap.mmap(-1, size)
            data = memoryview(buffer)[:size]
            _read_block(block, data, files)
            out.write(data)
            digest.update(data)
            progress(size)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _read_block(block: Block, data: memoryview, files: Sequence[ByteSource]) -> None:
    """Fill `data` with a block of the source, from the slots in the shard files."""
    if isinstance(block, CopyBlock):
        for copy in block.copies:
            target = copy.targets[0]  # all copies of a redundant expert are equal
            piece = data[copy.begin - block.begin : copy.end - block.begin]
            files[target.file].read_into(piece, target.offset)
        return
    scratch = memoryview(bytearray(scratch_bytes(block)))
    for targets, view in slot_views(block, scratch):
        files[targets[0].file].read_into(view, targets[0].offset)
    restore_block(block, scratch, data)
