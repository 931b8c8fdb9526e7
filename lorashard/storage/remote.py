"""Folders on other machines: on the Hugging Face Hub, or anywhere that fsspec has a driver for.

In: what a user named. Out: a local path or a `RemoteFolder`, from `locate`; and of remote files just
the bytes that are needed, by range requests. A Hub folder is pinned to the commit that its revision
resolved to first. The libraries' own caches of file content are not used.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.errors import AdapterError
from lorashard.rules import REPLACED_WHILE_READ
from lorashard.storage.ahead import WINDOW_BYTES, WINDOWS_AHEAD, FetchAhead
from lorashard.storage.drivers import is_hub, read_range, size_and_version
from lorashard.storage.hub import (
    access_error,
    address_of_page,
    last_name,
    looks_like_hub_id,
    parse_address,
    summarize_error,
    translating_errors,
)
from lorashard.storage.packages import missing_driver


@dataclass(frozen=True)
class RemoteFile:
    """One file of a known size. name: for messages. version: a text that changes with the content.

    path: as the driver `fs` names the file.
    """

    name: str
    path: str
    size_bytes: int
    version: str
    fs: Any

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end), exactly. Retries if a connection breaks. Raises AdapterError."""
        if begin >= end:
            return b""
        try:
            return read_range(self.fs, self.path, begin, end, self.size_bytes)
        except PermissionError as err:
            raise access_error(self.name, err) from err
        except Exception as err:
            raise AdapterError(
                f"{self.name}: cannot be read ({summarize_error(err)}).",
                hint="Is the server reachable? Try again.",
            ) from err

    @contextmanager
    def opened(
        self, begin: int = 0, *, window_bytes: int = WINDOW_BYTES, ahead: int = WINDOWS_AHEAD
    ) -> Iterator[FetchAhead]:
        """A ByteSource of [begin, size_bytes) for a reader that goes front to back.

        window_bytes, ahead: as FetchAhead has them.
        Raises AdapterError if the file has changed by the end of the block.
        """
        try:
            fetching = FetchAhead(self.read, begin, self.size_bytes, window_bytes, ahead)
            with closing(fetching) as source:
                yield source
        except AdapterError:
            self._check_unchanged()  # a better reason than a range that no longer exists
            raise
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        try:
            now = size_and_version(self.fs, self.path, self.name, refresh=True)
        except FileNotFoundError:
            now = None
        if now != (self.size_bytes, self.version):
            raise AdapterError(
                f"{self.name}: it changed while being read.",
                hint="Run the command again when nobody is writing there.",
                rule=REPLACED_WHILE_READ,
            )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder. text: what the user wrote. path: as the driver `fs` names it.

    repo, revision: of the Hub, the repository and the commit; elsewhere None.
    """

    text: str
    path: str
    fs: Any
    repo: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part of its name without the revision: what to call a local copy."""
        return last_name(self.text)

    def child(self, name: str) -> RemoteFolder:
        """A folder in it."""
        return RemoteFolder(
            f"{self.text}/{name}", f"{self.path}/{name}", self.fs, self.repo, self.revision
        )

    def file(self, name: str) -> RemoteFile | None:
        """A file in it; None if there is none. Raises AdapterError if the place does not answer."""
        path, shown = f"{self.path}/{name}", f"{self.text}/{name}"
        try:
            size, version = size_and_version(self.fs, path, shown)
        except FileNotFoundError:
            return None
        return RemoteFile(shown, path, size, version, self.fs)

    def has(self, name: str) -> bool:
        """Whether an optional file exists.

        Without the right to list a bucket, S3 answers 403 for missing keys too. That is treated as
        missing; reading a required file will show which of the two it was.
        """
        try:
            return self.file(name) is not None
        except AdapterError as err:
            if isinstance(err.__cause__, PermissionError):
                return False
            raise

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted. Raises AdapterError if it is not a folder itself."""
        return self._names("directory")

    def files(self) -> list[str]:
        """The same for the files in it."""
        return self._names("file")

    def _names(self, kind: str) -> list[str]:
        try:
            entries = self.fs.ls(self.path, detail=True)
        except FileNotFoundError as err:
            raise AdapterError(
                f"{self.text}: no such folder, or it is empty.", hint="Is the name right?"
            ) from err
        except Exception as err:
            raise access_error(self.text, err) from err
        names = [e["name"].rstrip("/") for e in entries if e.get("type") == kind]
        return sorted(name.rpartition("/")[2] for name in names)


Location = Path | RemoteFolder


def is_remote(text: str) -> bool:
    """Whether a name is a URL, or looks like a Hub id while there is no such local path or parent."""
    # These do not raise for what no file can be called, or nobody may look at.
    could_be_local = os.path.exists(text) or os.path.exists(os.path.dirname(text) or ".")  # noqa: PTH110, PTH120
    return "://" in text or (looks_like_hub_id(text) and not could_be_local)


def locate(named: str | os.PathLike[str] | RemoteFolder) -> Location:
    """Where a name leads: a local path, hf://owner/name[@revision], s3://..., gs://... and so on.

    `owner/name` alone is on the Hub if there is no such local path. With HF_HUB_OFFLINE the Hub's
    local cache is used. Raises AdapterError for a place that does not answer.
    """
    if isinstance(named, RemoteFolder):
        return named
    text = os.fspath(named)
    if not text.strip():  # as from a shell variable that is not set; Path("") is the current folder
        raise AdapterError(f"{text!r} is not a place.", hint="Give a path, a Hub id or a URL.")
    if "://" in text:
        return open_url(text)
    path = Path(text)
    if isinstance(named, str) and is_remote(text):
        try:
            return open_url(f"hf://{text}")
        except AdapterError as err:
            raise AdapterError(
                f"{text}: no such directory here, and {err.message}", hint=err.hint
            ) from err
    return path


@contextmanager
def local_copy(place: Location, names: Sequence[str]) -> Iterator[Path]:
    """A local directory with those of the named files that the place has.

    Files from the Hub stay in its cache; those from other places are in a temporary directory.
    Raises AdapterError.
    """
    if isinstance(place, Path):
        yield place
        return
    present = [name for name in names if place.has(name)]
    if place.repo is not None:
        from huggingface_hub import snapshot_download

        folder = place.path.removeprefix(f"{place.repo}@{place.revision}").strip("/")
        patterns = [f"{folder}/{name}".lstrip("/") for name in present]
        try:
            copy = snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)
        except Exception as err:
            raise access_error(place.text, err) from err
        yield Path(copy) / folder
        return
    with tempfile.TemporaryDirectory(prefix="lorashard-") as temporary:
        try:
            for name in present:
                place.fs.get_file(f"{place.path}/{name}", f"{temporary}/{name}")
        except Exception as err:
            raise access_error(place.text, err) from err
        yield Path(temporary)


def over_local_files(path: Path) -> RemoteFolder:
    """A local directory as a RemoteFolder, for code that reads either."""
    from fsspec.implementations.local import LocalFileSystem  # noqa: PLC0415

    return RemoteFolder(str(path), os.path.abspath(path), LocalFileSystem())


def open_url(text: str) -> Location:
    """The folder of a URL; with HF_HUB_OFFLINE one in the Hub's local cache. Raises AdapterError."""
    import fsspec  # noqa: PLC0415 - takes 0.1 s, and only remote places need it

    text = address_of_page(text) or text
    try:
        fs, path = fsspec.url_to_fs(text)
    except ImportError as err:
        raise missing_driver(text) or AdapterError(
            f"{text}: its driver cannot be imported ({summarize_error(err)}).",
            hint="Install what it names with pip, in the environment of lorashard.",
        ) from err
    except ValueError as err:
        raise missing_driver(text) or AdapterError(
            f"{text}: {err}.", hint="Is the part before :// right?"
        ) from err
    if is_hub(fs):
        return _open_hub(text, fs)
    fs.invalidate_cache()  # fsspec keeps drivers, and their listings, for as long as the process runs
    return RemoteFolder(text.rstrip("/"), path.rstrip("/"), fs)


def _open_hub(text: str, fs: Any) -> Location:
    from huggingface_hub import HfApi, constants, snapshot_download

    address, shown = parse_address(text), text.rstrip("/")
    repo, revision = address.repo, address.revision
    with translating_errors(shown):
        if constants.HF_HUB_OFFLINE:
            copy = snapshot_download(repo, revision=revision, local_files_only=True)
            return Path(copy) / address.folder
        commit = HfApi().model_info(repo, revision=revision).sha
    pinned = f"{repo}@{commit}/{address.folder}".rstrip("/")
    return RemoteFolder(shown, pinned, fs, repo, commit)
