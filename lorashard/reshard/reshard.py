"""Shards -> shards for another placement, bit for bit, without the source adapter.

The manifest keeps the source's header, so the plan of the old files can be made again, and that of
the new ones from it. Each old file is read once, front to back, and must have the digest in the
manifest before the new directory appears. What appears is what `split` of the source would write.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import VerificationError
from lorashard.progress import Progress
from lorashard.reshard.moves import MovePlan, Stretch, plan_moves
from lorashard.shards.directory import (
    check_file,
    find_file,
    is_shard_directory,
    read_manifest,
    reading_shards,
    write_manifest,
)
from lorashard.shards.manifest import Manifest, describe_files
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import Strategy, place_experts
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.shards.replan import check_manifest, digest_finding, read_own_config, replan
from lorashard.storage.ahead import WINDOW_BYTES
from lorashard.storage.local import ByteSource, LocalFile, write_synced
from lorashard.storage.remote import Location, RemoteFolder, locate
from lorashard.storage.small_files import read_json
from lorashard.storage.staging import check_target, staged_directory
from lorashard.version import __version__
from lorashard.writing.execute import write_files

# Of remote files, a window each is being read and one is under way: together about so much.
_FETCHED_BYTES = 32 * 2**20
_LEAST_WINDOW_BYTES = 256 * 2**10


def reshard_shards(
    shards: str | os.PathLike[str] | RemoteFolder,
    out: str | os.PathLike[str],
    ep_size: int,
    *,
    strategy: Strategy = "linear",
    expert_map: Path | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the shard directory `out` with the experts of `shards` on `ep_size` ranks.

    shards: a directory, or hf://owner/name[@revision] or another URL, which is streamed.
    expert_map: a JSON file with an explicit placement; it wins over `strategy`.
    out: may be `shards` itself with `force`, which then changes places in one instant.
    progress: called with bytes of the old files done since the last call.
    Raises PlacementError, ShardError if the shards are not what `split` wrote, or AdapterError for
    a place that does not answer, or changes meanwhile.
    """
    place, out = locate(shards), Path(out)
    manifest = read_manifest(place)
    check_target(out, force=force, replaceable=is_shard_directory)
    config_bytes = read_own_config(manifest, place)
    layout, old = replan(manifest, config_bytes, place)
    check_manifest(manifest, layout, place)
    spec = None if expert_map is None else read_json(expert_map)
    placement = place_experts(layout, ep_size, strategy, spec)
    new = build_plan(layout, placement, manifest.dtype)
    moves = plan_moves(layout, old, manifest.placement, new, placement)
    with staged_directory(
        out, last=MANIFEST_NAME, force=force, replaceable=is_shard_directory
    ) as staging:
        digests = _move_bytes(moves, old, manifest, place, staging, progress)
        manifest = replace(
            manifest,
            lorashard_version=__version__,
            placement=placement,
            files=describe_files(new, digests),
        )
        write_synced(staging / CONFIG_NAME, config_bytes)
        write_manifest(staging, manifest)
    return manifest


def _move_bytes(
    moves: MovePlan,
    old: ShardPlan,
    manifest: Manifest,
    shards: Location,
    staging: Path,
    progress: Progress,
) -> tuple[str, ...]:
    """Write the new files; returns their digests. Raises unless each old file has its own."""
    with reading_shards(), _opened(shards, manifest) as files:
        source = _OldFiles(files, moves.stretches)
        for number, file in enumerate(old.files):
            source.read_header(number, len(file.header))
            progress(len(file.header))
        digests = write_files(moves.plan, source, staging, progress)
    findings = tuple(
        digest_finding(shards, name)
        for (name, recorded), found in zip(manifest.files.items(), source.digests())
        if found != recorded.digest.blake3
    )
    if findings:
        raise VerificationError(str(shards), findings)
    return digests


class _OldFiles:
    """The stretches one after the other as a ByteSource; digests each file as it is read."""

    def __init__(self, files: Sequence[ByteSource], stretches: Sequence[Stretch]) -> None:
        self._files = files
        self._stretches = stretches
        self._begins = list(accumulate((s.end - s.begin for s in stretches), initial=0))
        self._digests = [blake3() for _ in files]
        self._read = [0] * len(files)  # per file, bytes

    def read_header(self, number: int, length: int) -> None:
        """Digest the first `length` bytes of a file, which no stretch has."""
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
        self._read[number] = begin + len(buffer)


@contextmanager
def _opened(shards: Location, manifest: Manifest) -> Iterator[list[ByteSource]]:
    """All files, each to be read front to back. Raises ShardError if one is not as recorded."""
    with ExitStack() as stack:
        if isinstance(shards, RemoteFolder):
            found = [find_file(shards, name, file.digest) for name, file in manifest.files.items()]
            window = max(_LEAST_WINDOW_BYTES, min(WINDOW_BYTES, _FETCHED_BYTES // len(found)))
            opened = (file.opened(window_bytes=window, ahead=1) for file in found)
            yield [stack.enter_context(file) for file in opened]
            return
        for name, recorded in manifest.files.items():
            check_file(shards / name, recorded)
        yield [stack.enter_context(closing(LocalFile(shards / name))) for name in manifest.files]
