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

from lorashard.adapter import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, AdapterIndex, parse_config
from lorashard.blocks import BLOCK_BYTES, Block, CopyBlock, split_into_blocks
from lorashard.errors import (
    HeaderError,
    LorashardError,
    ManifestError,
    ShardError,
    VerificationError,
)
from lorashard.execute import Progress
from lorashard.header import LENGTH_BYTES, header_length, parse_header
from lorashard.layout import AdapterLayout, detect_layout
from lorashard.manifest import MANIFEST_NAME, Manifest
from lorashard.output import check_target, staged_directory
from lorashard.pipeline import has_files_of, read_manifest, write_synced
from lorashard.plan import ShardPlan, build_plan
from lorashard.read import read_config
from lorashard.rearrange import restore_block, scratch_bytes, slot_views
from lorashard.remote import Place
from lorashard.shard import reading_shards
from lorashard.sources import LocalFile


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
    config_bytes = read_config(shards / CONFIG_NAME)
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


def replan(
    manifest: Manifest, config_bytes: bytes, shards: Place
) -> tuple[AdapterLayout, ShardPlan]:
    """The layout and the plan that `split` carried out, made again from the manifest.

    Raises ManifestError if the files that it leads to are not the ones in the manifest.
    """
    path = f"{shards}/{MANIFEST_NAME}"
    header_bytes = manifest.source.header
    try:
        config = parse_config(config_bytes, f"{shards}/{CONFIG_NAME}")
        size = manifest.source.files[WEIGHTS_NAME].size_bytes
        length = header_length(header_bytes, size, path)
        text = header_bytes[LENGTH_BYTES:]
        if len(text) != length:
            raise HeaderError(path, "the header has another length than it says")
        header = parse_header(text, size, path)
        index = AdapterIndex(config, header.tensors, header.data_begin, header.file_size)
        layout = detect_layout(index, manifest.options, str(shards))
        plan = build_plan(layout, manifest.placement, manifest.dtype)
    except LorashardError as err:
        raise ManifestError(path, f"does not describe its source ({err.message})") from err
    if not has_files_of(manifest, plan):
        raise ManifestError(path, "its tensor tables do not follow from its source and placement")
    return layout, plan


def source_was_pickled(manifest: Manifest) -> bool:
    """Whether the source was adapter_model.bin; `merge` gives its tensors as safetensors."""
    return PICKLE_NAME in manifest.source.files


def is_plain_adapter(_path: Path, names: frozenset[str]) -> bool:
    """Whether a directory with these names holds an adapter and nothing else."""
    return names == {CONFIG_NAME, WEIGHTS_NAME}


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
