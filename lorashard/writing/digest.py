"""BLAKE3 of files while they are being written, each front to back, close behind the writers.

In: a plan, and how far its source has been processed. Out: the digest of every file, known as soon
as the last byte is written, without reading the files again from disk.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from lorashard.shards.plan import CopyRange, ShardPlan
from lorashard.storage.buffers import allocate_private
from lorashard.storage.syscalls import start_writeback

_STEP = 2**20
_THREADS = 2  # one falls behind the writers, and is alone with the rest when they are done


@dataclass(frozen=True, slots=True)
class Milestone:
    """When source bytes [0, source_end) are processed, the file is final up to dest_end."""

    source_end: int
    dest_end: int


def find_milestones(plan: ShardPlan) -> tuple[tuple[Milestone, ...], ...]:
    """For each file, which prefix of it is final when; both fields ascend.

    So the front of a file can be digested before the rest of it is written.
    """
    regions: list[list[tuple[int, int, int]]] = [
        [(0, len(file.header), 0)] for file in plan.files
    ]  # (dest begin, dest end, source end)
    for op in plan.reads:
        slots = (op.targets,) if isinstance(op, CopyRange) else op.targets
        size = op.end - op.begin if isinstance(op, CopyRange) else op.slot_bytes
        for targets in slots:
            for target in targets:
                regions[target.file].append((target.offset, target.offset + size, op.end))
    for zero in plan.zeros:
        begin = zero.target.offset
        regions[zero.target.file].append((begin, begin + zero.size_bytes, 0))
    return tuple(_prefix_maxima(sorted(pieces)) for pieces in regions)


def _prefix_maxima(pieces: Sequence[tuple[int, int, int]]) -> tuple[Milestone, ...]:
    milestones: list[Milestone] = []
    needed = 0
    for _, dest_end, source_end in pieces:
        needed = max(needed, source_end)
        if milestones and milestones[-1].source_end == needed:
            milestones.pop()
        milestones.append(Milestone(needed, dest_end))
    return tuple(milestones)


class BackgroundHasher:
    """Threads that digest the output files, each front to back, close behind the writers."""

    def __init__(self, fds: Sequence[int], plan: ShardPlan, *, sync: bool = True) -> None:
        """sync: the disk is to begin with what is digested, because the files will be synced."""
        self._fds = fds
        self._sync = sync
        self._sizes = [file.size_bytes for file in plan.files]
        self._milestones = find_milestones(plan)
        self._passed = [0] * len(fds)  # per file, how many milestones are reached
        self._digested = [0] * len(fds)  # per file, bytes
        self._digests = [blake3() for _ in fds]
        self._source_end = 0
        self._finished = self._stopped = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        shares = [range(first, len(fds), _THREADS) for first in range(_THREADS)]
        self._threads = [
            threading.Thread(target=self._run, args=(share,), name="lorashard-digest", daemon=True)
            for share in shares
        ]

    def __enter__(self) -> BackgroundHasher:  # noqa: PYI034 - Self needs Python 3.11
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._join()

    def advance(self, source_end: int) -> None:
        """Report that source bytes [0, source_end) are written to where they belong."""
        with self._changed:
            self._source_end = max(self._source_end, source_end)
            self._changed.notify_all()

    def finish(self) -> tuple[str, ...]:
        """Report that everything is written; digest the rest and return the digests in hex."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        self._join()
        if self._error is not None:
            raise self._error
        return tuple(digest.hexdigest() for digest in self._digests)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, files: Sequence[int]) -> None:
        try:
            buffer = memoryview(allocate_private(_STEP))
            while not self._stopped:
                with self._changed:
                    finished, source_end = self._finished, self._source_end
                progressed = [self._catch_up(file, source_end, finished, buffer) for file in files]
                if finished and not any(progressed):
                    return
                with self._changed:
                    unchanged = (finished, source_end) == (self._finished, self._source_end)
                    if unchanged and not any(progressed) and not self._stopped:
                        self._changed.wait()
        except BaseException as err:  # noqa: BLE001 - finish() raises it in the caller's thread
            self._error = err

    def _catch_up(self, file: int, source_end: int, finished: bool, buffer: memoryview) -> bool:
        """Digest one step of a file's final prefix. Returns whether there was one to digest."""
        final = self._sizes[file] if finished else self._final_prefix(file, source_end)
        begin = self._digested[file]
        length = min(final - begin, _STEP)
        if length <= 0 or (length < _STEP and not finished):
            return False
        done = 0
        while done < length:
            count = os.preadv(self._fds[file], [buffer[done:length]], begin + done)
            if count == 0:
                raise OSError(errno.EIO, "an output file became shorter while being written")
            done += count
        self._digests[file].update(buffer[:length])
        self._digested[file] = begin + length
        if self._sync:
            start_writeback(self._fds[file], begin, length)
        return True

    def _final_prefix(self, file: int, source_end: int) -> int:
        milestones: Sequence[Milestone] = self._milestones[file]
        passed = self._passed[file]
        while passed < len(milestones) and milestones[passed].source_end <= source_end:
            passed += 1
        self._passed[file] = passed
        return milestones[passed - 1].dest_end if passed else 0
