"""Shards -> the source adapter, bit for bit: the split plan run backwards.

The manifest keeps the source's header, so the same pure stages give the same plan; its reads say
where each source byte is now. The digest of the result must be the one that `split` recorded.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
)
from lorashard.adapter.read import is_plain_adapter
from lorashard.errors import (
    HeaderError,
    ShardError,
    VerificationError,
)
from lorashard.progress import Progress
from lorashard.shards.directory import read_manifest, reading_shards
from lorashard.shards.manifest import Manifest
from lorashard.shards.plan import ShardPlan
from lorashard.shards.replan import replan
from lorashard.storage.local import LocalFile, write_synced
from lorashard.storage.small_files import read_small_file
from lorashard.storage.staging import check_target, staged_directory
from lorashard.writing.blocks import BLOCK_BYTES, Block, CopyBlock, split_into_blocks
from lorashard.writing.rearrange import restore_block, scratch_bytes, slot_views


def merge_shards(
    shards: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the adapter that `shards` was split from into the directory `out`.

    progress: called with source bytes done since the last call.
    Raises ShardError if the shards were cast, or are no longer what `split` wrote.
    """
    shards, out = Path(shards), Path(out)
    manifest = read_manifest(shards)
    if manifest.dtype is not None:
        raise ShardError(
            f"{shards}: the values were cast to {manifest.dtype}, so the source cannot be given "
            "back bit for bit.",
            hint="Split without --dtype to be able to merge.",
        )
    check_target(out, force=force, replaceable=is_plain_adapter)
    config_bytes = read_small_file(shards, CONFIG_NAME)
    _, plan = replan(manifest, config_bytes, shards)
    with staged_directory(
        out, last=CONFIG_NAME, force=force, replaceable=is_plain_adapter
    ) as staging:
        with reading_shards():
            digest = _write_weights(manifest, plan, shards, staging / WEIGHTS_NAME, progress)
        expected = manifest.source.files[WEIGHTS_NAME].blake3
        if digest != expected:
            raise VerificationError(
                shards, (f"merged {WEIGHTS_NAME} has BLAKE3 {digest}, the source had {expected}",)
            )
        write_synced(staging / CONFIG_NAME, config_bytes)
    return manifest


def _write_weights(
    manifest: Manifest, plan: ShardPlan, shards: Path, path: Path, progress: Progress
) -> str:
    digest = blake3(manifest.source.header)
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(shards / file.name)) for file in plan.files]
        out = stack.enter_context(path.open("xb"))
        out.write(manifest.source.header)
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        for block in split_into_blocks(plan.reads):
            size = block.end - block.begin
            if len(buffer) < size:
                buffer = mmap.mmap(-1, size)
            data = memoryview(buffer)[:size]
            _gather_block(block, data, files)
            out.write(data)
            digest.update(data)
            progress(size)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _gather_block(block: Block, data: memoryview, files: Sequence[LocalFile]) -> None:
    if isinstance(block, CopyBlock):
        for copy in block.copies:
            target = copy.targets[0]  # copies of a redundant expert are equal
            piece = data[copy.begin - block.begin : copy.end - block.begin]
            files[target.file].read_into(piece, target.offset)
        return
    scratch = memoryview(bytearray(scratch_bytes(block)))
    for targets, view in slot_views(block, scratch):
        files[targets[0].file].read_into(view, targets[0].offset)
    restore_block(block, scratch, data)


@contextmanager
def _opened(path: Path) -> Iterator[LocalFile]:
    try:
        file = LocalFile(path)
    except HeaderError as err:
        raise ShardError(
            f"{path}: {err.reason}.", hint="merge needs the files of all ranks."
        ) from err
    try:
        yield file
    finally:
        file.close()
