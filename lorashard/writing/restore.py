"""Shard files -> the source's bytes, block by block: the plan of a split run backwards.

`merge` writes these bytes; `verify`, `reshard` and `convert` only digest them, which proves that each
expert's data is where the placement says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain

from blake3 import blake3

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.progress import Progress
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.plan import CopyRange, Rearrange, ShardPlan, Target
from lorashard.storage.buffers import ThreadBuffer
from lorashard.storage.digests import (
    LARGE_STEP_BYTES,
    STEP_BYTES,
    read_in_threads,
    reading_threads,
)
from lorashard.storage.local import ByteSource, LocalFile
from lorashard.writing.blocks import (
    Block,
    CopyBlock,
    find_runs,
    split_into_blocks,
)
from lorashard.writing.rearrange import restore_block, scratch_bytes, slot_views


def restore_source(
    plan: ShardPlan,
    header: bytes,
    files: Sequence[ByteSource],
    write: Callable[[memoryview], object],
    progress: Progress,
    *,
    threads: int = 1,
) -> str:
    """Give `write` the source's data, front to back, in blocks; returns the source's BLAKE3 in hex.

    Only if nothing was cast. header: the source's bytes before its data. files: the shard files, in
    the plan's order. progress: called with the size in bytes of each block. threads: that digest;
    with several, files are not read front to back.
    """
    digest = blake3(header, max_threads=threads)
    with ThreadPoolExecutor(1) as hasher, closing(_read_blocks(plan, files, threads)) as blocks:
        for data in blocks:
            digested = hasher.submit(digest.update, data)
            write(data)
            digested.result()
            progress(len(data))
    return digest.hexdigest()


def _read_blocks(
    plan: ShardPlan, files: Sequence[ByteSource], threads: int
) -> Generator[memoryview, None, None]:
    """The source's data block by block; each is valid until the next one is asked for.

    For several threads the blocks are aligned: what BLAKE3 gives to each thread is a power of two, and
    ends at a multiple of it. So from an odd place on it has to begin with little (19 GB/s, not 27).
    """
    scratch = ThreadBuffer()
    blocks = (
        split_into_blocks(plan.reads)
        if threads == 1
        else split_into_blocks(plan.reads, LARGE_STEP_BYTES, is_aligned=True)
    )
    return read_in_threads(
        blocks,
        lambda block: block.end - block.begin,
        lambda block, data: _read_block(block, data, files, scratch),
        reading_threads(threads),
    )


def proof_bytes(manifest: Manifest) -> int:
    """What `describe_misplaced` reports as progress, in total."""
    if manifest.dtype is not None:
        return 0
    return manifest.source.files[WEIGHTS_NAME].size_bytes - len(manifest.source.header)


def describe_misplaced(
    manifest: Manifest, plan: ShardPlan, files: Sequence[ByteSource], progress: Progress
) -> Iterator[str]:
    """Whether each expert's data is where the placement says, by the source's digest.

    That does not follow from values that were cast: of them, only copies are compared.
    plan: rebuilt from `manifest`. progress: called with the source's bytes done since the last call.
    """
    yield from describe_places(plan, find_misplaced(plan, files))
    if manifest.dtype is not None:
        return
    digest = restore_source(plan, manifest.source.header, files, len, progress)
    if digest != manifest.source.files[WEIGHTS_NAME].blake3:
        yield (
            f"{MANIFEST_NAME}: with this placement, the shards hold another adapter than the one "
            "whose digest is recorded; experts would be served in each other's place"
        )


def describe_places(plan: ShardPlan, faults: Iterable[tuple[Target, str]]) -> Iterator[str]:
    """One sentence for all places of a file that have the same fault, with the first of them."""
    first: dict[tuple[int, str], int] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for target, fault in faults:
        first.setdefault((target.file, fault), target.offset)
        counts[target.file, fault] += 1
    for (file, fault), offset in first.items():
        others = counts[file, fault] - 1
        more = f" (and {others} more like it)" if others else ""
        yield f"{plan.files[file].name}: what begins at byte {offset} {fault}{more}"


def find_misplaced(plan: ShardPlan, files: Sequence[ByteSource]) -> Iterator[tuple[Target, str]]:
    """Where the data is not what the plan says, as far as the shards themselves show it.

    That is where copies of an expert differ, and where an untrained expert, or the rest of a smaller
    r, is not zero.
    """
    for op in plan.reads:
        size = op.end - op.begin if isinstance(op, CopyRange) else op.slot_bytes
        for targets in (op.targets,) if isinstance(op, CopyRange) else op.targets:
            for other in targets[1:]:
                if any(a != b for a, b in _steps(size, files, targets[0], other)):
                    yield other, "differs from another copy of the same expert"
    for target in _find_filled_zeros(plan, files):
        yield target, "is not zero, though nothing of the source belongs there"


def _find_filled_zeros(plan: ShardPlan, files: Sequence[ByteSource]) -> Iterator[Target]:
    for zero in plan.zeros:
        steps = _steps(zero.size_bytes, files, zero.target)
        if any(data.count(0) != len(data) for (data,) in steps):
            yield zero.target
    for op in plan.reads:
        if isinstance(op, Rearrange) and (op.rows, op.cols) != (op.slot_rows, op.slot_cols):
            for place in chain.from_iterable(op.targets):
                if not _is_padded_with_zeros(op, place, files):
                    yield place


def _is_padded_with_zeros(op: Rearrange, place: Target, files: Sequence[ByteSource]) -> bool:
    """Whether a slot is zero where the factor, of a smaller r, does not fill it."""
    import numpy as np  # noqa: PLC0415 - plain copies do not need it

    row_bytes = op.slot_cols * ELEMENT_SIZE[op.dtype]
    step = max(1, STEP_BYTES // row_bytes)
    for first in range(0, op.slot_rows, step):
        buffer = bytearray(min(step, op.slot_rows - first) * row_bytes)
        files[place.file].read_into(memoryview(buffer), place.offset + first * row_bytes)
        rows = np.frombuffer(buffer, np.uint8).reshape(-1, row_bytes)
        filled = max(0, op.rows - first)
        if rows[filled:].any() or rows[:filled, op.cols * ELEMENT_SIZE[op.dtype] :].any():
            return False
    return True


def _read_block(
    block: Block, data: memoryview, files: Sequence[ByteSource], scratch: ThreadBuffer
) -> None:
    """Fill `data` with a block of the source, from the slots in the shard files."""
    if isinstance(block, CopyBlock):
        # Of several places the first; `find_misplaced` compares the others.
        places = ((copy.targets[0], copy.begin, copy.end) for copy in block.copies)
        for run in find_runs(places):
            pieces = [data[begin - block.begin : end - block.begin] for begin, end in run.pieces]
            _read_pieces(files[run.target.file], pieces, run.target.offset)
        return
    slots = scratch.get(scratch_bytes(block))
    for targets, view in slot_views(block, slots):
        files[targets[0].file].read_into(view, targets[0].offset)
    restore_block(block, slots, data)


def _read_pieces(file: ByteSource, pieces: Sequence[memoryview], offset: int) -> None:
    if isinstance(file, LocalFile):
        file.read_pieces(pieces, offset)
        return
    for piece in pieces:
        file.read_into(piece, offset)
        offset += len(piece)


def _steps(
    size: int, files: Sequence[ByteSource], *places: Target
) -> Iterator[tuple[bytearray, ...]]:
    """The bytes of several places, side by side."""
    for begin in range(0, size, STEP_BYTES):
        pieces = tuple(bytearray(min(STEP_BYTES, size - begin)) for _ in places)
        for piece, place in zip(pieces, places):
            files[place.file].read_into(memoryview(piece), place.offset + begin)
        yield pieces
