"""Of a shard directory elsewhere, what some ranks need: manifest, replicated file, their rank files.

Files are fetched into a work directory beside the target, by ranges and with a digest that grows
with them, and the target appears when all are whole and proven. What an interrupted pull has
fetched stays in the work directory, and the next one goes on from there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from lorashard.errors import OutputExistsError, ShardError
from lorashard.progress import Progress
from lorashard.shards.directory import find_file, is_shard_directory, manifest_bytes, needed_files
from lorashard.shards.manifest import FileDigest, Manifest, parse_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.ahead import WINDOW_BYTES, FetchAhead
from lorashard.storage.parallel import Outcome, run_all
from lorashard.storage.remote import RemoteFile, RemoteFolder, locate, over_local_files
from lorashard.storage.staging import WORK_INSIDE, check_target, staged_directory
from lorashard.storage.syscalls import start_writeback

# Small files cost a few answers and no bytes: meanwhile a large one is under way. Where all of them
# are large, fewer windows of each are, so that memory stays what it is.
_FILES_AT_ONCE = 3
_WINDOWS_OF_EACH = 3
_STEP = 2**20
_PART = ".part"


@dataclass(frozen=True, slots=True)
class FoundShards:
    """A shard directory elsewhere. raw: the bytes of its manifest."""

    source: RemoteFolder
    raw: bytes
    manifest: Manifest


def find_shards(shards: str | os.PathLike[str]) -> FoundShards:
    """Fetch the manifest. Raises AdapterError for a place that does not answer, ManifestError."""
    place = locate(shards)
    source = over_local_files(place) if isinstance(place, Path) else place
    raw = manifest_bytes(source)
    return FoundShards(source, raw, parse_manifest(raw, f"{source}/{MANIFEST_NAME}"))


def pull_shards(
    shards: str | os.PathLike[str] | FoundShards,
    out: str | os.PathLike[str],
    ep_ranks: Sequence[int],
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Fetch what `ep_ranks` need into the directory `out`; its manifest.

    A directory that has the same manifest gets the files that it lacks.
    progress: called with bytes fetched since the last call.
    Raises AdapterError for a place that does not answer, ShardError.
    """
    found = shards if isinstance(shards, FoundShards) else find_shards(shards)
    source, raw, manifest = found.source, found.raw, found.manifest
    target = Path(os.path.abspath(out))
    wanted = needed_files(manifest, ep_ranks, str(source))
    adds = _holds(target, raw)
    if adds:
        wanted = {name: d for name, d in wanted.items() if not _is_whole(target / name, d)}
    else:
        check_target(target, force=force, replaceable=is_shard_directory)
    with _work_directory(target, raw) as work:
        _fetch_all(source, wanted, work, progress)
        if adds:
            for name in wanted:
                (work / name).replace(target / name)
        else:
            with staged_directory(
                target, last=MANIFEST_NAME, force=force, replaceable=is_shard_directory
            ) as staging:
                for name in (*wanted, MANIFEST_NAME):
                    os.rename(work / name, staging / name)
    return manifest


def _holds(target: Path, manifest: bytes) -> bool:
    try:
        return (target / MANIFEST_NAME).read_bytes() == manifest
    except OSError:
        return False


def _is_whole(path: Path, digest: FileDigest) -> bool:
    return path.is_file() and path.stat().st_size == digest.size_bytes


@contextmanager
def _work_directory(target: Path, manifest: bytes) -> Iterator[Path]:
    """A locked directory that outlives a failure; begun anew for another manifest.

    Raises OutputExistsError if another pull works on the same target.
    """
    beside = target.with_name(f".{target.name}.lorashard-pull")
    work = target / WORK_INSIDE if os.path.ismount(target) else beside
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise OutputExistsError(
                target, reason="another lorashard is pulling it", hint="Wait for it, or end it."
            ) from err
        if not _holds(work, manifest):
            for child in work.iterdir():
                child.unlink()
            (work / MANIFEST_NAME).write_bytes(manifest)
        yield work
        shutil.rmtree(work)
    finally:
        os.close(lock)


def _fetch_all(
    source: RemoteFolder, wanted: Mapping[str, FileDigest], work: Path, progress: Progress
) -> None:
    large = sum(digest.size_bytes > WINDOW_BYTES for digest in wanted.values())
    windows = {} if large < _FILES_AT_ONCE else {"ahead": _WINDOWS_OF_EACH}

    def fetch(name: str, alive: Progress) -> None:
        def advance(size_bytes: int) -> None:
            alive(size_bytes)
            progress(size_bytes)

        _fetch(source, name, wanted[name], work / name, windows, advance)

    def finished(outcome: Outcome[str, None]) -> None:
        if outcome.error is not None:
            raise outcome.error  # what was fetched stays for the next pull

    run_all(tuple(wanted), fetch, workers=_FILES_AT_ONCE, finished=finished)


def _fetch(
    source: RemoteFolder,
    name: str,
    digest: FileDigest,
    path: Path,
    windows: Mapping[str, int],
    progress: Progress,
) -> None:
    if _is_whole(path, digest):  # it got its name when it was proven
        progress(digest.size_bytes)
        return
    file = find_file(source, name, digest)
    part = path.with_name(path.name + _PART)
    if _fetch_rest(file, part, windows, progress) != digest.blake3:
        part.unlink()
        raise ShardError(
            f"{file.name}: its bytes are not those that were written.",
            hint="Pull again; if it stays so, upload the whole directory again.",
        )
    os.rename(part, path)


def _fetch_rest(
    file: RemoteFile, part: Path, windows: Mapping[str, int], progress: Progress
) -> str:
    """Append what is missing to `part`; the digest of the whole. windows: as FetchAhead has them."""
    hasher = blake3()
    with part.open("a+b") as out:
        out.seek(0)
        while fetched := out.read(_STEP):
            hasher.update(fetched)
            progress(len(fetched))
        done = out.tell()
        with closing(FetchAhead(file.read, done, file.size_bytes, **windows)) as source:
            buffer = memoryview(bytearray(_STEP))
            while done < file.size_bytes:
                piece = buffer[: file.size_bytes - done]
                source.read_into(piece, done)
                out.write(piece)
                start_writeback(out.fileno(), done, len(piece))
                hasher.update(piece)
                progress(len(piece))
                done += len(piece)
        out.flush()
        os.fsync(out.fileno())
    return hasher.hexdigest()
