"""ShardPlan + ByteSource -> files. One forward pass, bounded memory, digests on the way.

The work is shared by threads, in calls that release the GIL: the caller's thread reads blocks in
source order and digests them, two write them to where they belong, and two digest the output files
as far as they are final.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from lorashard.progress import Progress
from lorashard.shards.plan import ShardPlan
from lorashard.storage.buffers import BufferPool, ThreadBuffer
from lorashard.storage.digests import STEP_BYTES
from lorashard.storage.local import (
    ByteSource,
    SharedWriter,
    opened_to_write,
    sync_all,
    write_all,
)
from lorashard.storage.syscalls import reserve
from lorashard.writing.blocks import (
    BLOCK_BYTES,
    Block,
    CopyBlock,
    find_runs,
    split_into_blocks,
)
from lorashard.writing.digest import BackgroundHasher
from lorashard.writing.rearrange import CastLoss, rearrange_block, scratch_bytes

_WRITERS = 2
_BUFFERS = _WRITERS + 1  # one is being read into
# A block of rows has a piece of each expert's slot: at least 64 KiB of it with 128 experts. The pages
# of a file that pieces share are written twice, and pieces half as long take 6 % more processor time.
_BLOCK_BYTES = 2 * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Digests:
    """BLAKE3 in hex: of the whole source, and of each output file in plan order."""

    source: str
    files: tuple[str, ...]


def execute_plan(
    plan: ShardPlan,
    source: ByteSource,
    source_header: bytes,
    directory: Path,
    progress: Progress,
    on_loss: Callable[[CastLoss], object] = lambda _: None,
    *,
    sync: bool = True,
) -> Digests:
    """Write every file of `plan` into the empty `directory`.

    source_header: the source's bytes up to its data, which are read already.
    progress: called with the number of source bytes done since the last call.
    on_loss: called, in any thread, with what a cast loses of a block.
    sync: wait until the disk has the files.
    Raises what `source` raises, LayoutError for a value that a cast would lose, OSError.
    """
    digest = blake3(source_header)
    files = write_files(plan, source, directory, progress, digest.update, on_loss, sync=sync)
    return Digests(digest.hexdigest(), files)


def write_files(
    plan: ShardPlan,
    source: ByteSource,
    directory: Path,
    progress: Progress,
    on_read: Callable[[memoryview], object] = lambda _: None,
    on_loss: Callable[[CastLoss], object] = lambda _: None,
    *,
    sync: bool = True,
) -> tuple[str, ...]:
    """The same for a source whose digest is not needed; returns the digests of the files.

    on_read: called with each piece of the source, in order, while it is in the processor's cache.
    """
    with ExitStack() as stack:
        fds = [stack.enter_context(opened_to_write(directory / file.name)) for file in plan.files]
        with ThreadPoolExecutor(max_workers=_WRITERS) as pool:  # bytes that nobody writes stay zero
            list(pool.map(reserve, fds, [file.size_bytes for file in plan.files]))
        for fd, file in zip(fds, plan.files):
            write_all(fd, memoryview(file.header), 0)
        hasher = stack.enter_context(BackgroundHasher(fds, plan, sync=sync))
        _write_blocks(plan, source, fds, hasher, progress, on_read, on_loss)
        files = hasher.finish()
        if sync:
            sync_all(fds)
    return files


def _write_blocks(
    plan: ShardPlan,
    source: ByteSource,
    fds: Sequence[int],
    hasher: BackgroundHasher,
    progress: Progress,
    on_read: Callable[[memoryview], object],
    on_loss: Callable[[CastLoss], object],
) -> None:
    writers = [SharedWriter(fd) for fd in fds]
    buffers = BufferPool(_BUFFERS, _BLOCK_BYTES)
    processed = _ProcessedPrefix(hasher.advance)
    scratch = ThreadBuffer()
    with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
        futures: list[Future[None]] = []
        for number, block in enumerate(split_into_blocks(plan.reads, _BLOCK_BYTES)):
            buffer = buffers.take(block.end - block.begin)
            data = memoryview(buffer)[: block.end - block.begin]
            for step in range(0, len(data), STEP_BYTES):
                piece = data[step : step + STEP_BYTES]
                source.read_into(piece, block.begin + step)
                on_read(piece)
            future = pool.submit(_write_block, block, data, writers, scratch, on_loss)
            # Only now may the buffer be reused: `on_read` is done with it too.
            future.add_done_callback(_release(number, block.end, buffer, buffers, processed))
            progress(block.end - block.begin)
            futures = _drop_finished([*futures, future])
        for future in futures:
            future.result()


def _release(
    number: int,
    source_end: int,
    buffer: mmap.mmap,
    buffers: BufferPool,
    processed: _ProcessedPrefix,
) -> Callable[[Future[None]], None]:
    """A callback for when a block is written: its buffer is free, its source bytes are processed."""

    def release(future: Future[None]) -> None:
        buffers.give(buffer)
        if future.exception() is None:
            processed.add(number, source_end)

    return release


def _drop_finished(futures: list[Future[None]]) -> list[Future[None]]:
    """Those that are still running. Raises the error of one that failed."""
    for future in futures:
        if future.done():
            future.result()
    return [future for future in futures if not future.done()]


def _write_block(
    block: Block,
    data: memoryview,
    writers: Sequence[SharedWriter],
    scratch: ThreadBuffer,
    on_loss: Callable[[CastLoss], object],
) -> None:
    if isinstance(block, CopyBlock):
        places = ((t, copy.begin, copy.end) for copy in block.copies for t in copy.targets)
        for run in find_runs(places):
            pieces = [data[begin - block.begin : end - block.begin] for begin, end in run.pieces]
            writers[run.target.file].write(pieces, run.target.offset)
        return
    for targets, view in rearrange_block(block, data, scratch.get(scratch_bytes(block)), on_loss):
        for target in targets:
            writers[target.file].write([view], target.offset)


class _ProcessedPrefix:
    """How far the source is processed without a gap, although blocks are written out of order.

    advance: called with the end of that prefix whenever it grows.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._next = 0
        self._ends: dict[int, int] = {}

    def add(self, number: int, source_end: int) -> None:
        """Block `number`, which ends at `source_end`, is written."""
        with self._lock:
            self._ends[number] = source_end
            reached = None
            while self._next in self._ends:
                reached = self._ends.pop(self._next)
                self._next += 1
        if reached is not None:
            self._advance(reached)
