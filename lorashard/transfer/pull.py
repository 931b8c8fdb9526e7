"""Part of a shard directory elsewhere -> a local one: the files that some ranks need.

In: the directory's place and ep ranks. Out: a local directory with the manifest, the replicated
file and those ranks' files.

Files are fetched by ranges into a work directory beside the target, with a digest that grows with
them. The target appears when all of them are complete and proven. What an interrupted pull has
fetched stays in the work directory, and the next pull continues from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from lorashard.errors import ShardError
from lorashard.progress import Progress
from lorashard.rules import DAMAGED_BYTES
from lorashard.shards.directory import (
    find_file,
    has_digest,
    holds_only_shards,
    manifest_bytes,
    needed_files,
    write_notice,
)
from lorashard.shards.manifest import FileDigest, Manifest
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.ahead import WINDOW_BYTES, WINDOWS_AHEAD, FetchAhead
from lorashard.storage.digests import STEP_BYTES, read_in_steps
from lorashard.storage.local import LocalFile, sync_directory, write_all
from lorashard.storage.locked_directory import FULL_DISK_HINT, has_content, resumable_directory
from lorashard.storage.parallel import Outcome, run_concurrently
from lorashard.storage.remote import RemoteFile, RemoteFolder, locate, over_local_files
from lorashard.storage.staging import check_target, clear_leftovers, staged_directory
from lorashard.storage.syscalls import start_writeback
from lorashard.storage.targets import explained_write_errors, resolve_target
from lorashard.writing.disk_space import check_disk_space

# Small files cost round trips rather than bytes, so a large one is fetched meanwhile. If there are
# as many large ones, each gets fewer windows, so that memory stays the same.
_FILES_AT_ONCE = 3
_WINDOWS_OF_EACH = 3
_PART = ".part"


@dataclass(frozen=True, slots=True)
class PullSource:
    """A shard directory to pull from. raw_manifest: the bytes of its lorashard.json."""

    source: RemoteFolder
    raw_manifest: bytes
    manifest: Manifest


def find_shards(shards: str | os.PathLike[str]) -> PullSource:
    """Fetch the manifest. Raises AdapterError for a place that does not answer, ManifestError."""
    place = locate(shards)
    source = over_local_files(place) if isinstance(place, Path) else place
    raw = manifest_bytes(source)
    return PullSource(source, raw, parse_manifest(raw, f"{source}/{MANIFEST_NAME}"))


def pull_shards(
    shards: str | os.PathLike[str] | PullSource,
    out: str | os.PathLike[str],
    ep_ranks: Sequence[int],
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Fetch the files that `ep_ranks` need into the directory `out`, and return its manifest.

    If `out` has the same manifest already, only the files that it lacks, or whose bytes
    differ, are fetched.
    progress: called with bytes fetched since the last call.
    Raises AdapterError for a place that does not answer, ShardError.
    """
    pulled = shards if isinstance(shards, PullSource) else find_shards(shards)
    source, raw_manifest, manifest = pulled.source, pulled.raw_manifest, pulled.manifest
    target = resolve_target(Path(out))
    needed = needed_files(manifest, ep_ranks, str(source))
    if not has_content(target / MANIFEST_NAME, raw_manifest):
        check_target(target, force=force, replaceable=holds_only_shards)
    with resumable_directory(target, marker=MANIFEST_NAME, content=raw_manifest) as work:
        # Only now, because another pull may have finished before this one had the lock.
        if has_content(target / MANIFEST_NAME, raw_manifest):
            missing = {n: d for n, d in needed.items() if not has_digest(target / n, d)}
            _fetch_all(source, missing, work, target, progress)
            for name in missing:
                os.rename(work / name, target / name)
            sync_directory(target)
            clear_leftovers(target)
        else:
            _fetch_all(source, needed, work, target, progress)
            with staged_directory(
                target, last=MANIFEST_NAME, force=force, replaceable=holds_only_shards
            ) as staging:
                write_notice(staging)
                for name in (*needed, MANIFEST_NAME):
                    os.rename(work / name, staging / name)
    return manifest


def plan_pull(
    pulled: PullSource,
    out: str | os.PathLike[str],
    ep_ranks: Sequence[int],
    *,
    force: bool = False,
) -> Mapping[str, int]:
    """What `pull_shards` would fetch: bytes by file name. Raises as it does, and writes nothing.

    What an interrupted pull has left counts as not there.
    """
    target = resolve_target(Path(out))
    needed = needed_files(pulled.manifest, ep_ranks, str(pulled.source))
    if has_content(target / MANIFEST_NAME, pulled.raw_manifest):
        needed = {n: d for n, d in needed.items() if not has_digest(target / n, d)}
    else:
        check_target(target, force=force, replaceable=holds_only_shards)
    sizes = {name: digest.size_bytes for name, digest in needed.items()}
    check_disk_space(target, sum(sizes.values()), hint=FULL_DISK_HINT)
    return sizes


def _fetch_all(
    source: RemoteFolder,
    files: Mapping[str, FileDigest],
    work: Path,
    target: Path,
    progress: Progress,
) -> None:
    """Fetch `files` into `work`, several at once. target: for messages."""
    missing = sum(digest.size_bytes - _fetched_bytes(work / n) for n, digest in files.items())
    check_disk_space(target, missing, hint=FULL_DISK_HINT)
    num_large = sum(digest.size_bytes > WINDOW_BYTES for digest in files.values())
    ahead = WINDOWS_AHEAD if num_large < _FILES_AT_ONCE else _WINDOWS_OF_EACH

    def fetch(name: str, check_cancelled: Progress) -> None:
        def advance(size_bytes: int) -> None:
            check_cancelled(size_bytes)
            progress(size_bytes)

        with explained_write_errors(target, full_disk=FULL_DISK_HINT):
            _fetch_file(source, name, files[name], work / name, ahead, advance)

    def finished(outcome: Outcome[str, None]) -> None:
        if outcome.error is not None:
            raise outcome.error  # what was fetched stays for the next pull

    run_concurrently(tuple(files), fetch, workers=_FILES_AT_ONCE, finished=finished)


def _fetched_bytes(path: Path) -> int:
    """Bytes that an earlier pull has left of a file."""
    for candidate in (path, path.with_name(path.name + _PART)):
        with suppress(OSError):
            return candidate.stat().st_size
    return 0


def _fetch_file(
    source: RemoteFolder,
    name: str,
    digest: FileDigest,
    path: Path,
    ahead: int,
    progress: Progress,
) -> None:
    """Fetch one file to `path`, and prove it. ahead: as FetchAhead has it."""
    if has_digest(path, digest):  # fetched by an earlier pull
        progress(digest.size_bytes)
        return
    file = find_file(source, name, digest)
    part = path.with_name(path.name + _PART)
    if _complete_part(file, part, ahead, progress) != digest.blake3:
        part.unlink()
        raise ShardError(
            f"{file.name}: its bytes are not those that were written.",
            hint="Pull again. If that does not help, upload the whole directory again.",
            rule=DAMAGED_BYTES,
        )
    os.rename(part, path)


def _complete_part(file: RemoteFile, part: Path, ahead: int, progress: Progress) -> str:
    """Fetch what `part` lacks of a file, append it and sync it; returns the whole file's digest."""
    hasher, buffer = blake3(), memoryview(bytearray(STEP_BYTES))
    # Without following a link: the work directory's name can be guessed.
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        done = os.fstat(fd).st_size
        with closing(LocalFile(part)) as fetched:
            for piece in read_in_steps(fetched, 0, done, buffer):
                hasher.update(piece)
                progress(len(piece))
        with closing(FetchAhead(file.read, done, file.size_bytes, ahead=ahead)) as source:
            for piece in read_in_steps(source, done, file.size_bytes, buffer):
                write_all(fd, piece, done)
                start_writeback(fd, done, len(piece))
                hasher.update(piece)
                progress(len(piece))
                done += len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return hasher.hexdigest()
