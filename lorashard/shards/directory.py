"""A shard directory, here or remote: its manifest, the files that belong in it, how they are opened.

In: what a user named as a path, a Hub id or a URL. Out: the manifest, and files that are proven to
have the size (of local ones also the header) that it records.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.notice import NOTICE, is_notice
from lorashard.errors import AdapterError, HeaderError, LorashardError, ManifestError, ShardError
from lorashard.header import Header
from lorashard.rules import DAMAGED_BYTES
from lorashard.shards.manifest import FileDigest, Manifest, ShardFile, format_manifest
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME, rank_file_name
from lorashard.shards.seal import is_seal_broken
from lorashard.storage.ahead import WINDOW_BYTES
from lorashard.storage.digests import digest_of
from lorashard.storage.local import ByteSource, LocalFile, write_new
from lorashard.storage.remote import Location, RemoteFile, RemoteFolder, local_copy, locate
from lorashard.storage.safetensors_file import read_header
from lorashard.storage.small_files import read_bounded

# All remote files of a directory are open at once, each with one window being read and one being
# fetched. Together the windows take about this much memory.
_FETCHED_BYTES = 32 * 2**20
_LEAST_WINDOW_BYTES = 256 * 2**10

# 560 stacks on each of 256 ranks, at 130 bytes each, are 19 MB.
MAX_MANIFEST_BYTES = 128 * 2**20
_TOO_LARGE = f"larger than {MAX_MANIFEST_BYTES} bytes, so not a manifest"


@dataclass(frozen=True, slots=True)
class LocatedShards:
    """A shard directory whose manifest has been read, and nothing else yet.

    was_changed: whether the manifest is another one than was written, as the digest in it shows.
    """

    place: Location
    manifest: Manifest
    was_changed: bool = False


# What the functions of the Python API take: a path, hf://owner/name[@revision], another URL.
Shards = str | os.PathLike[str] | RemoteFolder | LocatedShards


def locate_shards(shards: Shards) -> LocatedShards:
    """Read the manifest of a shard directory, unless that has been done.

    Raises AdapterError if a remote place does not answer, ManifestError if it is not a finished
    shard directory.
    """
    if isinstance(shards, LocatedShards):
        return shards
    place = locate(shards)
    content = manifest_bytes(place)
    manifest = parse_manifest(content, f"{place}/{MANIFEST_NAME}")
    return LocatedShards(place, manifest, is_seal_broken(content))


@contextmanager
def local_shards(shards: LocatedShards, ep_ranks: Sequence[int] | None = None) -> Iterator[Path]:
    """The directory on this machine: a remote one is fetched, whole or what some ranks need.

    Hub files stay in the Hub's cache; those of other places are deleted when the block ends.
    Raises AdapterError, or ShardError for a rank that the directory does not have.
    """
    manifest = shards.manifest
    files = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, shards.place)
    names = (MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME, *files)
    with local_copy(shards.place, names) as directory:
        yield directory


# What belongs in a shard directory.


def claims_to_be_shards(place: Location) -> bool:
    """Whether a place has a manifest, so that it is to be read as shards and not as an adapter.

    The manifest may still turn out to be damaged.
    """
    if isinstance(place, RemoteFolder):
        return place.has(MANIFEST_NAME)
    return (place / MANIFEST_NAME).is_file()


def shard_directory_names(manifest: Manifest) -> frozenset[str]:
    """The names of all files that make up a shard directory.

    The notice, which is what WEIGHTS_NAME is here, may be missing.
    """
    return frozenset({MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME, *manifest.files})


def holds_only_shards(path: Path, names: frozenset[str]) -> bool:
    """Whether a directory with `names` in it is a finished shard directory and nothing else.

    This is what `--force` may replace. A README.md or a dot file, which `verify` tolerates, is
    somebody's work and would be lost, so a directory that has one is not replaced.
    """
    try:
        if WEIGHTS_NAME in names and not is_notice(path / WEIGHTS_NAME):
            return False
        return names <= shard_directory_names(read_manifest(path))
    except LorashardError:
        return False


def is_repository_file(name: str) -> bool:
    """Whether a repository or a download adds a file of this name to the shards that it holds.

    For example README.md (the model card), .gitattributes, .cache.
    """
    return name == "README.md" or name.startswith(".")


# The manifest.


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a shard directory. Raises ManifestError if it has none, or a damaged one."""
    return parse_manifest(manifest_bytes(directory), f"{directory}/{MANIFEST_NAME}")


def manifest_bytes(directory: Location) -> bytes:
    """The manifest as it is stored. Raises ManifestError if there is none."""
    if isinstance(directory, RemoteFolder):
        file = directory.file(MANIFEST_NAME)
        if file is None:
            raise ManifestError(
                f"{directory}/{MANIFEST_NAME}",
                "no such file",
                hint="Is the name right, and is this a shard directory written by `lorashard split`?",
            )
        if file.size_bytes > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{directory}/{MANIFEST_NAME}", _TOO_LARGE, rule=DAMAGED_BYTES)
        return file.read(0, file.size_bytes)
    path = directory / MANIFEST_NAME
    try:
        return read_bounded(path, MAX_MANIFEST_BYTES)
    except AdapterError as err:
        raise ManifestError(path, _TOO_LARGE, rule=DAMAGED_BYTES) from err
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise ManifestError(path, f"cannot be read ({err.strerror})") from err
        if directory.is_dir():
            raise ManifestError(path, "not a finished shard directory") from err
        raise ManifestError(path, "no such directory", hint="Is the name right?") from err


def write_notice(directory: Path, *, sync: bool = True) -> None:
    """Write what a program reads that takes the shard directory for a plain adapter."""
    write_new(directory / WEIGHTS_NAME, NOTICE, sync=sync)


def write_manifest(directory: Path, manifest: Manifest, *, sync: bool = True) -> None:
    """Write lorashard.json, after checking that it can be read back unchanged."""
    content, path = format_manifest(manifest), directory / MANIFEST_NAME
    if parse_manifest(content, str(path)) != manifest:
        raise ManifestError(
            path,
            "cannot be read back as it was written",
            hint="This is a bug in lorashard; please report it. Nothing was written.",
        )
    write_new(path, content, sync=sync)


# The other files.


def needed_files(
    manifest: Manifest, ep_ranks: Sequence[int], where: object
) -> dict[str, FileDigest]:
    """The files beside the manifest that these ranks need. Raises ShardError for a wrong rank."""
    ep_size = manifest.placement.ep_size
    for ep_rank in ep_ranks:
        if not 0 <= ep_rank < ep_size:
            raise ShardError(
                f"{where}: no ep rank {ep_rank}; it is split for {ep_size} ranks, "
                f"0 to {ep_size - 1}."
            )
    names = [REPLICATED_NAME, *(rank_file_name(k, ep_size) for k in sorted(set(ep_ranks)))]
    config = manifest.source.files[CONFIG_NAME]
    return {CONFIG_NAME: config} | {name: manifest.files[name].digest for name in names}


def find_files(shards: LocatedShards) -> tuple[Path | RemoteFile, ...]:
    """All shard files, in the manifest's order, checked without reading their data.

    Raises ShardError if one is missing or is not as the manifest records it.
    """
    place, recorded = shards.place, shards.manifest.files
    if isinstance(place, RemoteFolder):
        return tuple(find_file(place, name, file.digest) for name, file in recorded.items())
    for name, file in recorded.items():
        check_file(place / name, file)
    return tuple(place / name for name in recorded)


def find_file(source: RemoteFolder, name: str, digest: FileDigest) -> RemoteFile:
    """A file of a remote directory. Raises ShardError if it is missing or has another size."""
    file = source.file(name)
    if file is None:
        raise ShardError(f"{source}: no {name}.", hint="Upload the whole directory again.")
    if file.size_bytes != digest.size_bytes:
        raise ShardError(
            f"{file.name}: {file.size_bytes} bytes, the manifest says {digest.size_bytes}.",
            hint="Upload the whole directory again; its files belong together.",
            rule=DAMAGED_BYTES,
        )
    return file


def check_file(path: Path, recorded: ShardFile) -> None:
    """Raise ShardError unless the file has the size and the header that the manifest records."""
    try:
        with reading_shards():
            _, header = read_header(path)
    except OSError as err:
        raise ShardError(f"{path}: {err.strerror}.", hint="Copy the directory again.") from err
    check_header(path, header, recorded)


def check_header(path: Path, header: Header, recorded: ShardFile) -> None:
    """The same for a file whose header has been read."""
    if header.file_size != recorded.digest.size_bytes:
        raise ShardError(
            f"{path}: {header.file_size} bytes, the manifest says {recorded.digest.size_bytes}.",
            hint="Copy the file again; it is incomplete or belongs to another directory.",
            rule=DAMAGED_BYTES,
        )
    if "ep_rank" in header.metadata:
        ep_rank, ep_size = header.metadata["ep_rank"], header.metadata.get("ep_size", "")
        written_as = f"ep-{ep_rank.zfill(5)}-of-{ep_size.zfill(5)}.safetensors"
        if path.name != written_as:
            raise ShardError(
                f"{path}: was written as {written_as}.",
                hint="The files of two ranks are swapped; copy the directory again.",
                rule=DAMAGED_BYTES,
            )
    if header.tensors != recorded.tensors:
        raise ShardError(
            f"{path}: its tensors are not those of the manifest.",
            hint="The file belongs to another directory; copy the right one.",
            rule=DAMAGED_BYTES,
        )


def has_digest(path: Path, digest: FileDigest) -> bool:
    """Whether a local file is there and has the size and the bytes that the manifest records."""
    try:
        if not path.is_file() or path.stat().st_size != digest.size_bytes:
            return False
        with closing(LocalFile(path)) as file:
            return digest_of(file, 0, digest.size_bytes, lambda _: None) == digest.blake3
    except (HeaderError, OSError):
        return False


@contextmanager
def opened_files(files: Sequence[Path | RemoteFile]) -> Iterator[list[ByteSource]]:
    """Open shard files, all at once. A remote one is to be read front to back.

    What goes wrong while they are read is raised as a ShardError (local) or AdapterError (remote),
    also if a file has changed by the end of the block.
    """
    window = max(_LEAST_WINDOW_BYTES, min(WINDOW_BYTES, _FETCHED_BYTES // max(1, len(files))))
    with reading_shards(), ExitStack() as stack:
        opened: list[ByteSource] = []
        local: list[LocalFile] = []
        for file in files:
            if isinstance(file, RemoteFile):
                opened.append(stack.enter_context(file.opened(window_bytes=window, ahead=1)))
            else:
                local.append(stack.enter_context(closing(LocalFile(file))))
                opened.append(local[-1])
        yield opened
        for local_file in local:
            _check_unchanged(local_file)


def _check_unchanged(file: LocalFile) -> None:
    try:
        file.check_unchanged()
    except AdapterError as err:
        raise ShardError(err.message, hint=err.hint, rule=err.rule) from err


@contextmanager
def reading_shards() -> Iterator[None]:
    """Whatever goes wrong while a shard file is read becomes a ShardError."""
    try:
        yield
    except HeaderError as err:
        raise ShardError(
            f"{err.path}: {err.reason}.", hint="Copy the file again.", rule=err.rule
        ) from err
