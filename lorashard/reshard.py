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

from lorashard import __version__
from lorashard.adapter import CONFIG_NAME
from lorashard.errors import (
    AdapterError,
    ManifestError,
    ShardError,
    VerificationError,
)
from lorashard.execute import Progress, write_files
from lorashard.fetch import WINDOW_BYTES
from lorashard.layout import AdapterLayout
from lorashard.manifest import MANIFEST_NAME, Manifest
from lorashard.merge import replan
from lorashard.moves import MovePlan, Stretch, plan_moves
from lorashard.output import check_target, staged_directory
from lorashard.pipeline import (
    Strategy,
    describe_files,
    describe_module,
    is_shard_directory,
    place_experts,
    read_manifest,
    write_manifest,
    write_synced,
)
from lorashard.plan import ShardPlan, build_plan
from lorashard.pull import find_file
from lorashard.read import read_config, read_small
from lorashard.remote import Place, RemoteFolder, locate
from lorashard.shard import check_file, reading_shards
from lorashard.sources import ByteSource, LocalFile

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
    placement = place_experts(layout, ep_size, strategy, expert_map)
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


def read_own_config(manifest: Manifest, shards: Place) -> bytes:
    """The config that `split` copied. Raises ShardError if it is not that one."""
    try:
        content = (
            read_small(shards, CONFIG_NAME)
            if isinstance(shards, RemoteFolder)
            else read_config(shards / CONFIG_NAME)
        )
    except AdapterError as err:
        raise ShardError(err.message, hint="Copy the directory again.") from err
    if blake3(content).hexdigest() != manifest.source.files[CONFIG_NAME].blake3:
        raise VerificationError(str(shards), (differs(shards, CONFIG_NAME),))
    return content


def check_manifest(manifest: Manifest, layout: AdapterLayout, shards: Place) -> None:
    """Raise ManifestError if what is carried over, or relied on, was changed since `split`."""
    path, placement = f"{shards}/{MANIFEST_NAME}", manifest.placement
    if {module.name: describe_module(module) for module in layout.modules} != manifest.modules:
        raise ManifestError(path, "does not describe its modules as its source has them")
    if placement.strategy != "explicit" and placement != place_experts(
        layout, placement.ep_size, placement.strategy, None
    ):
        raise ManifestError(path, f"its ranks are not those of a {placement.strategy} placement")


def _move_bytes(
    moves: MovePlan,
    old: ShardPlan,
    manifest: Manifest,
    shards: Place,
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
        differs(shards, name)
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


def differs(shards: Place, name: str) -> str:
    """The finding about a file that has another digest."""
    return f"{shards}/{name}: BLAKE3 differs from the manifest's"


@contextmanager
def _opened(shards: Place, manifest: Manifest) -> Iterator[list[ByteSource]]:
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
