"""Folders that are not on this machine: the Hugging Face Hub, and what fsspec has a driver for.

`locate` turns what a user named into a local path or a RemoteFolder. Of a remote file only the
bytes that are asked for are fetched, by range requests; a Hub folder is pinned to the commit that
its revision meant at the first look. The library's own caches of file content are not used.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.errors import AdapterError
from lorashard.storage.ahead import FetchAhead
from lorashard.storage.hub import (
    access_error,
    last_name,
    looks_like_hub_id,
    parse_address,
    summarize_error,
    translating_errors,
)

_ATTEMPTS = 3
_FIRST_WAIT_S = 0.25
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})


@dataclass(frozen=True)
class RemoteFile:
    """One file with a known size. `name` is for messages; `key` changes when the content does."""

    name: str
    path: str
    size_bytes: int
    key: str
    fs: Any

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end), exactly. Tried again when a connection breaks. Raises AdapterError."""
        if begin >= end:
            return b""
        # Without a cache of its own: HfFileSystem reads 5 MiB further by default.
        exact = {"cache_type": "none", "size": self.size_bytes} if _is_hub(self.fs) else {}
        reason: object = ""
        # huggingface_hub itself tries to read again, for 20 s.
        for attempt in range(1 if exact else _attempts(self.fs)):
            if attempt:
                time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                data: bytes = self.fs.cat_file(self.path, start=begin, end=end, **exact)
            except PermissionError as err:
                raise access_error(self.name, err) from err
            except FileNotFoundError as err:
                reason = summarize_error(err)
                break
            except Exception as err:  # noqa: BLE001 - each driver has its own for a broken line
                reason = summarize_error(err)
                continue
            if len(data) == end - begin:
                return data
            reason = f"{len(data)} bytes came instead of {end - begin}"
        raise AdapterError(
            f"{self.name}: cannot be read ({reason}).", hint="Is the place up? Try again."
        )

    @contextmanager
    def opened(self, begin: int = 0, **windows: int) -> Iterator[FetchAhead]:
        """A ByteSource of what follows `begin`, which fetches ahead of who reads front to back.

        windows: FetchAhead's window_bytes and ahead.
        Raises AdapterError if the file is another one at the end than at the beginning.
        """
        try:
            with closing(FetchAhead(self.read, begin, self.size_bytes, **windows)) as source:
                yield source
        except AdapterError:
            self._check_unchanged()  # says more than that a range is no longer there
            raise
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        try:
            now = _describe(self.fs, self.path, self.name, refresh=True)
        except FileNotFoundError:
            now = None
        if now != (self.size_bytes, self.key):
            raise AdapterError(
                f"{self.name}: it changed while being read.",
                hint="Run the command again, when nobody writes there.",
            )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder. `text` is what the user wrote; repo and revision (a commit) are the Hub's."""

    text: str
    path: str
    fs: Any
    repo: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part of its name, without a revision: what a local copy would be called."""
        return last_name(self.text)

    def child(self, name: str) -> RemoteFolder:
        """A folder in it."""
        return RemoteFolder(
            f"{self.text}/{name}", f"{self.path}/{name}", self.fs, self.repo, self.revision
        )

    def file(self, name: str) -> RemoteFile | None:
        """A file in it, None if there is none. Raises AdapterError if the place cannot be asked."""
        path, shown = f"{self.path}/{name}", f"{self.text}/{name}"
        try:
            size, key = _describe(self.fs, path, shown)
        except FileNotFoundError:
            return None
        return RemoteFile(shown, path, size, key, self.fs)

    def has(self, name: str) -> bool:
        """Whether a file that may be missing is there.

        Who may not list a bucket gets the same answer from S3 for what is missing as for what is
        forbidden; then it is missing, and what is needed beside it will tell the two apart.
        """
        try:
            return self.file(name) is not None
        except AdapterError as err:
            if isinstance(err.__cause__, PermissionError):
                return False
            raise

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted. Raises AdapterError if it is none itself."""
        try:
            entries = self.fs.ls(self.path, detail=True)
        except FileNotFoundError as err:
            raise AdapterError(
                f"{self.text}: no such folder, or nothing in it.", hint="Is the name right?"
            ) from err
        except Exception as err:
            raise access_error(self.text, err) from err
        names = [e["name"].rstrip("/") for e in entries if e.get("type") == "directory"]
        return sorted(name.rpartition("/")[2] for name in names)


Location = Path | RemoteFolder


def is_remote(text: str) -> bool:
    """Whether a name means something elsewhere: a URL, or a Hub id where no such path exists."""
    path = Path(text)
    free = not path.exists() and not path.parent.exists()
    return "://" in text or (looks_like_hub_id(text) and free)


def locate(named: str | os.PathLike[str] | RemoteFolder) -> Location:
    """A local path; hf://owner/name[@revision], or owner/name on the Hub; s3://, gs:// and so on.

    `owner/name` is the Hub's only where no such local path exists. With HF_HUB_OFFLINE it is the
    Hub's own local cache. Raises AdapterError for a place that does not answer.
    """
    if isinstance(named, RemoteFolder):
        return named
    text = os.fspath(named)
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
    """A directory with those files of a place, as far as it has them.

    Of the Hub they are kept in its cache, of other places in a temporary directory.
    """
    if isinstance(place, Path):
        yield place
        return
    found = [name for name in names if place.has(name)]
    if place.repo is not None:
        from huggingface_hub import snapshot_download

        folder = place.path.removeprefix(f"{place.repo}@{place.revision}").strip("/")
        patterns = [f"{folder}/{name}".lstrip("/") for name in found]
        try:
            copy = snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)
        except Exception as err:
            raise access_error(place.text, err) from err
        yield Path(copy) / folder
        return
    with tempfile.TemporaryDirectory(prefix="lorashard-") as temporary:
        try:
            for name in found:
                place.fs.get_file(f"{place.path}/{name}", f"{temporary}/{name}")
        except Exception as err:
            raise access_error(place.text, err) from err
        yield Path(temporary)


def over_local_files(path: Path) -> RemoteFolder:
    """A local directory in the same terms."""
    from fsspec.implementations.local import LocalFileSystem  # noqa: PLC0415

    return RemoteFolder(str(path), os.path.abspath(path), LocalFileSystem())


def open_url(text: str) -> Location:
    """What a URL names; a local directory only offline, the Hub's cache. Raises AdapterError."""
    import fsspec  # noqa: PLC0415 - takes 0.1 s, and only remote places need it

    try:
        fs, path = fsspec.url_to_fs(text)
    except ImportError as err:
        raise AdapterError(
            f"{text}: needs a driver that is not installed ({err}).", hint="pip install it."
        ) from err
    except ValueError as err:
        raise AdapterError(f"{text}: {err}.", hint="Is the part before :// right?") from err
    if _is_hub(fs):
        return _open_hub(text, fs)
    fs.invalidate_cache()  # fsspec keeps drivers, and what they listed, as long as the process lives
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


def _protocols(fs: Any) -> frozenset[str]:
    return frozenset(fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _is_hub(fs: Any) -> bool:
    return "hf" in _protocols(fs)


def is_object_store(fs: Any) -> bool:
    """Whether folders are only parts of names there, and the driver tries again itself."""
    return bool(_protocols(fs) & _OBJECT_STORES)


def _attempts(fs: Any) -> int:
    """Their drivers try for up to 10 s: to repeat that would only delay the message."""
    return 1 if is_object_store(fs) else _ATTEMPTS


def _describe(fs: Any, path: str, shown: str, *, refresh: bool = False) -> tuple[int, str]:
    """(size, what changes with the content). Raises FileNotFoundError, or AdapterError."""
    if refresh:
        fs.invalidate_cache()
    for left in reversed(range(_attempts(fs))):
        try:
            found = fs.info(path)
            break
        except NotADirectoryError as err:
            raise FileNotFoundError(shown) from err
        except FileNotFoundError:
            raise
        except Exception as err:
            if left == 0 or isinstance(err, PermissionError):
                raise access_error(shown, err) from err
            time.sleep(_FIRST_WAIT_S * 2 ** (_ATTEMPTS - 1 - left))
    if found.get("type") != "file" or found.get("size") is None:
        raise FileNotFoundError(shown)
    marks = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime")
    return int(found["size"]), " ".join(f"{found[mark]}" for mark in marks if mark in found)
