"""A shard directory -> one with another placement, bit for bit, without the source adapter.

The manifest keeps the source's header, so the plan of the old files can be made again, and from it
that of the new ones. Each old file is read once, front to back, and must have the digest in the
manifest before the new directory appears, and copies of an expert must be equal; and the new files
must give the source's digest, which proves the old placement, too. The result is what `split` of the
source would write.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import VerificationError
from lorashard.progress import Progress
from lorashard.reshard.copies import CopyDigests
from lorashard.reshard.moves import MovePlan, Stretch, plan_moves
from lorashard.shards.describe import describe_files
from lorashard.shards.directory import (
    LocatedShards,
    Shards,
    holds_only_shards,
    locate_shards,
    opened_files,
    write_manifest,
    write_notice,
)
from lorashard.shards.expert_map import ExpertMap, read_expert_map
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import Placement, place_experts
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.shards.replan import CheckedShards, check_shards, describe_wrong_digest
from lorashard.storage.local import ByteSource, write_new
from lorashard.storage.staging import check_target, staged_directory
from lorashard.version import __version__
from lorashard.vllm_options import Strategy
from lorashard.writing.disk_space import check_disk_space
from lorashard.writing.execute import write_files
from lorashard.writing.restore import describe_misplaced, describe_places


def reshard_shards(
    shards: Shards,
    out: str | os.PathLike[str],
    ep_size: int,
    *,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the shard directory `out` with the experts of `shards` on `ep_size` ranks.

    shards: a directory, or hf://owner/name[@revision] or another URL, which is streamed.
    expert_map: an explicit placement, which takes precedence over `strategy`: a JSON file, its
    content, or a Placement.
    out: may be `shards` itself with `force`; it is then replaced in one instant.
    progress: called with bytes done since the last call: those of the old files, then, to prove the
    old placement, those of the source (`proof_bytes`).
    Raises PlacementError, ShardError if the shards are not what `split` wrote, or AdapterError for
    a remote place that does not answer, or changes while it is read.
    """
    located, out = locate_shards(shards), Path(out)
    old, placement, new_plan = _decide(located, out, ep_size, strategy, expert_map, force=force)
    moves = plan_moves(old.layout, old.plan, old.manifest.placement, new_plan, placement)
    with staged_directory(
        out, last=MANIFEST_NAME, force=force, replaceable=holds_only_shards
    ) as staging:
        digests = _move_bytes(moves, old, staging, progress)
        manifest = replace(
            old.manifest,
            lorashard_version=__version__,
            placement=placement,
            files=describe_files(new_plan, digests),
        )
        _check_placed_data(old, manifest, new_plan, staging, progress)
        write_new(staging / CONFIG_NAME, old.config_bytes)
        write_notice(staging)
        write_manifest(staging, manifest)
    return manifest


def plan_reshard(
    shards: Shards,
    out: str | os.PathLike[str],
    ep_size: int,
    *,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    force: bool = False,
) -> tuple[Placement, Mapping[str, int]]:
    """The new placement, and the bytes of each new file. Raises as `reshard_shards`; writes nothing.

    What only reading everything shows, such as a wrong digest, is not found.
    """
    located, out = locate_shards(shards), Path(out)
    _, placement, plan = _decide(located, out, ep_size, strategy, expert_map, force=force)
    return placement, {file.name: file.size_bytes for file in plan.files}


def _decide(
    located: LocatedShards,
    out: Path,
    ep_size: int,
    strategy: Strategy,
    expert_map: ExpertMap | None,
    *,
    force: bool,
) -> tuple[CheckedShards, Placement, ShardPlan]:
    """The old files, and the new placement and plan, if they can be written."""
    check_target(out, force=force, replaceable=holds_only_shards)
    old = check_shards(located)
    explicit = read_expert_map(expert_map)
    placement = place_experts(old.layout, ep_size, strategy, explicit)
    plan = build_plan(old.layout, placement, old.manifest.dtype)
    size_bytes = sum(file.size_bytes for file in plan.files)
    check_disk_space(out, size_bytes)
    return old, placement, plan


def _move_bytes(
    moves: MovePlan, old: CheckedShards, staging: Path, progress: Progress
) -> tuple[str, ...]:
    """Write the new files and return their digests.

    Raises VerificationError unless each old file has the digest that the manifest records, and
    copies of an expert are equal: those that are dropped are not in the new files.
    """
    with opened_files(old.files) as files:
        copies = CopyDigests(moves.copies, len(files))
        source = _OldFiles(files, moves.stretches, copies)
        for number, file in enumerate(old.plan.files):
            source.read_header(number, len(file.header))
            progress(len(file.header))
        digests = write_files(moves.plan, source, staging, progress)
    findings = tuple(
        describe_wrong_digest(old.place, name)
        for (name, recorded), digest in zip(old.manifest.files.items(), source.digests())
        if digest != recorded.digest.blake3
    ) or tuple(describe_places(old.plan, copies.find_different()))
    if findings:
        raise VerificationError(str(old.place), findings)
    return digests


def _check_placed_data(
    old: CheckedShards, new: Manifest, plan: ShardPlan, staging: Path, progress: Progress
) -> None:
    """Raise VerificationError if the old data was not where the old placement says.

    The new files have the same fault as the old ones, and are here and in the page cache.
    """
    with opened_files([staging / file.name for file in plan.files]) as files:
        findings = tuple(describe_misplaced(new, plan, files, progress))
    if findings:
        raise VerificationError(str(old.place), findings)


class _OldFiles:
    """The stretches, one after the other, as a ByteSource; digests each file as it is read."""

    def __init__(
        self, files: Sequence[ByteSource], stretches: Sequence[Stretch], copies: CopyDigests
    ) -> None:
        self._files = files
        self._copies = copies
        self._stretches = stretches
        self._begins = list(accumulate((s.end - s.begin for s in stretches), initial=0))
        self._digests = [blake3() for _ in files]
        self._read = [0] * len(files)  # per file, bytes

    def read_header(self, number: int, length: int) -> None:
        """Digest the first `length` bytes of a file, which no stretch covers."""
        self._read_next(number, memoryview(bytearray(length)), 0)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`, which is where the last call ended."""
        number = bisect_right(self._begins, offset) - 1
        while buffer:
            stretch = self._stretches[number]
            begin = stretch.begin + offset - self._begins[number]
            length = min(len(buffer), stretch.end - begin)
            self._read_next(stretch.file, buffer[:length], begin)
            buffer, offset, number = buffer[length:], offset + length, number + 1

    def digests(self) -> list[str]:
        """BLAKE3 in hex of each file, as far as it was read."""
        return [digest.hexdigest() for digest in self._digests]

    def _read_next(self, number: int, buffer: memoryview, begin: int) -> None:
        assert begin == self._read[number], "a digest takes a file front to back"
        self._files[number].read_into(buffer, begin)
        self._digests[number].update(buffer)
        self._copies.update(number, buffer, begin)
        self._read[number] = begin + len(buffer)
