"""Publisher: versions of an adapter, from a trainer's shard directories to vLLM servers and other places.

What is served is what the servers list, so a trainer that starts again, or a server that does, needs
no care.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import LorashardError, ServerError, ShardError
from lorashard.publish.records import forget, record, was_written_again
from lorashard.publish.remote_versions import RemoteVersions
from lorashard.publish.removal import (
    clear_removed,
    clear_unfinished,
    remove_shards,
    remove_spare,
)
from lorashard.publish.servers import Server, parse_server
from lorashard.publish.versions import is_adapter_name, outdated, version_name, version_of
from lorashard.shards.directory import LocatedShards, find_files, has_digest, read_manifest
from lorashard.storage.parallel import Outcome, run_concurrently
from lorashard.storage.targets import resolve_target

_MOST_THREADS = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Removal:
    """versions: that no server has any more, and whose directories are gone, in order.

    left: why others are still there, here or where they were uploaded, one line each. The next
    `publish` tries them again.
    """

    versions: tuple[int, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A version that every server answers with. name: for requests. path: here, not on the servers.

    uploaded_to: for `lorashard pull`; None if it was not to be uploaded.
    load_s, upload_s, removal_s: seconds until all had answered, for the upload, and for the versions
    before.
    """

    version: int
    name: str
    path: Path
    servers: tuple[str, ...]
    uploaded_to: str | None
    removal: Removal
    load_s: float
    upload_s: float
    removal_s: float


class Publisher:
    """Versions of one adapter: a name and a path for each, loaded on servers, removed when outdated.

        publisher = Publisher("/dev/shm/policies", "policy", servers=["http://a:8000"], keep=2)
        save_sharded(model, publisher.path(17), ep_size=8)  # on every rank
        publisher.publish(17)  # on one rank; requests name "policy-v00017" from then on

    The servers need VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --max-cpu-loras of at least keep + 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        *,
        servers: Sequence[str] = (),
        keep: int = 2,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        directory_on_servers: str | None = None,
        upload_to: str | None = None,
        private: bool = False,
        keep_spare: bool = True,
    ) -> None:
        """directory: holds the versions; only directories in it that are named as versions are touched.

        servers: base URLs, such as http://host:8000; each server itself, not a balancer before several.
        keep: how many versions stay loaded, the newest included.
        api_key: the servers'. timeout_s: of each request, without a byte from the server.
        directory_on_servers: what servers call `directory`, if they see it under another path.
        upload_to: a URL, which gets a folder for each version and keeps the last `keep`; or a Hub
        repository (hf://owner/name[@branch][/folder]), which gets a commit with the version's name as
        its tag, and whose history keeps all.
        private: make a repository that is created private.
        keep_spare: where the directory is in memory (/dev/shm), the files of the version that was
        removed last stay, for the next one to be written to them: twice as fast. They are no adapter.
        Raises ValueError, or ShardError if `directory` is a URL.
        """
        if not is_adapter_name(name):
            raise ValueError(f"{name!r}: a name has letters, digits, '.', '_' and '-' only")
        if keep < 1:
            raise ValueError(f"keep={keep}: the newest version stays")
        resolve_target(Path(directory))  # refuses a URL
        # Links stay as they are: servers may see the directory by this path alone.
        self._directory = Path(os.path.abspath(directory))
        self._name, self._keep = name, keep
        self._keep_spare = keep_spare
        self._servers = tuple(
            dict.fromkeys(parse_server(url, api_key, timeout_s) for url in servers)
        )
        self._directory_on_servers = directory_on_servers or str(self._directory)
        self._remote = None if upload_to is None else RemoteVersions(upload_to, name, private)
        if self._remote is not None:
            self._remote.check()

    def path(self, version: int) -> Path:
        """Where a version's shards are to be written. The last part is the name that servers know.

        A version that was published is not to be written again: servers go by the name.
        """
        return self._directory / self._version_name(version)

    def publish(self, version: int) -> Published:
        """Have all servers load a version that is written, upload it, and then remove outdated ones.

        All or none: if one does not load it, or makes no token with it, those that had loaded it unload
        it again. Versions before the last `keep` go only after all have answered, and a directory only
        once no server lists it. What cannot be removed is no error, see Published.removal.
        It may be repeated. File sizes and headers are checked, not digests.
        Raises ShardError for a directory that is not complete, ServerError naming each server that
        failed; and if the servers have it and the upload failed, AdapterError or OutputExistsError.
        """
        began = time.perf_counter()
        name, path = self._version_name(version), self.path(version)
        _check_complete(path)
        self._load(name)
        loaded = time.perf_counter()
        place: str | None = None
        left: tuple[str, ...] = ()
        if self._remote is not None:
            place = self._remote.upload(path, version)
        uploaded = time.perf_counter()
        removal = self._remove(outdated(version, self._served(), self._present(), self._keep))
        clear_unfinished(self._directory, lambda found: self._is_before(found, version))
        if self._remote is not None:
            left = self._remote.remove_outdated(version, self._keep)
        return Published(
            version,
            name,
            path,
            tuple(server.url for server in self._servers),
            place,
            Removal(removal.versions, (*removal.left, *left)),
            load_s=loaded - began,
            upload_s=uploaded - loaded,
            removal_s=time.perf_counter() - uploaded,
        )

    def withdraw(self) -> Removal:
        """Unload all versions from all servers, and remove their directories. What was uploaded stays."""
        removal = self._remove(sorted({*self._served(), *self._present()}))
        clear_unfinished(self._directory, lambda found: version_of(self._name, found) is not None)
        remove_spare(self._directory)
        return removal

    def _load(self, name: str) -> None:
        here, path = self._directory / name, self._path_on_servers(name)
        known = _on_each(self._servers, lambda server: server.has(name, path))
        failed = _errors(known)
        new = [outcome.job for outcome in known if not outcome.result]
        if len(new) < len(known) and was_written_again(here):
            raise ShardError(
                f"{here}: it was written again after a server had loaded it, which would go on with "
                "the weights from before.",
                hint="Publish it under a number that was not used.",
            )
        undone: list[LorashardError] = []
        if not failed:
            if new:
                record(here)
            try:
                failed = _errors(_on_each(new, lambda server: server.load(name, path)))
                failed = failed or _errors(_on_each(self._servers, lambda s: s.answer(name)))
            except BaseException:
                _on_each(new, lambda server: server.unload(name))
                raise
            if failed:
                # Those that refused it as well: one that gave no answer may have loaded it.
                undone = _errors(_on_each(new, lambda server: server.unload(name)))
        if failed:
            raise _not_taken(name, failed, undone, len(self._servers))

    def _remove(self, versions: Sequence[int]) -> Removal:
        names = [self._version_name(version) for version in versions]
        lists = _on_each(self._servers, lambda server: self._unload(server, names))
        failed = [error.message for error in _errors(lists)]
        removed, left = [], []
        for version, name in zip(versions, names):
            used = [
                f"{outcome.job.url} still lists it"
                for outcome in lists
                if outcome.result and self._is_used(name, outcome.result)
            ]
            reason = next(iter((*failed, *used)), None) or remove_shards(
                self._directory / name, as_spare=self._keep_spare
            )
            if reason is None:
                forget(self._directory / name)
                removed.append(version)
            else:
                left.append(f"{name}: {reason}")
        if self._directory.is_dir():
            clear_removed(self._directory, lambda found: version_of(self._name, found) is not None)
        return Removal(tuple(removed), tuple(left))

    def _unload(self, server: Server, names: Sequence[str]) -> dict[str, str | None]:
        """What the server lists afterwards. A name that was loaded from elsewhere is not ours."""
        if not names:
            return {}
        for name, path in server.models().items():
            if name in names and path == self._path_on_servers(name):
                server.unload(name)
        return dict(server.models())

    def _served(self) -> set[int]:
        """The versions that servers list. One that does not answer has no say: `_remove` asks again."""
        found = set()
        for outcome in _on_each(self._servers, lambda server: server.models()):
            for name, path in (outcome.result or {}).items():
                version = version_of(self._name, name)
                if version is not None and path == self._path_on_servers(name):
                    found.add(version)
        return found

    def _present(self) -> set[int]:
        """The versions that have a directory."""
        names = os.listdir(self._directory) if self._directory.is_dir() else []
        return {version for name in names if (version := version_of(self._name, name)) is not None}

    def _is_before(self, found: str, version: int) -> bool:
        other = version_of(self._name, found)
        return other is not None and other < version

    def _is_used(self, name: str, models: dict[str, str | None]) -> bool:
        return name in models or self._path_on_servers(name) in models.values()

    def _path_on_servers(self, name: str) -> str:
        return f"{self._directory_on_servers.rstrip('/')}/{name}"

    def _version_name(self, version: int) -> str:
        if version < 0:
            raise ValueError(f"version {version}: versions count from 0")
        return version_name(self._name, version)


def _check_complete(path: Path) -> None:
    """Raise ShardError unless all files are there, as the manifest records them."""
    manifest = read_manifest(path)
    find_files(LocatedShards(path, manifest))
    if not has_digest(path / CONFIG_NAME, manifest.source.files[CONFIG_NAME]):
        raise ShardError(
            f"{path}: {CONFIG_NAME} is not the one that the manifest records.",
            hint="Write the version again.",
        )


def _on_each(
    servers: Sequence[Server], work: Callable[[Server], T]
) -> tuple[Outcome[Server, T], ...]:
    """Do something on all servers at once."""
    return run_concurrently(
        servers,
        lambda server, _: work(server),
        workers=max(1, min(_MOST_THREADS, len(servers))),
        finished=lambda _: None,
    )


def _errors(outcomes: Sequence[Outcome[Server, T]]) -> list[LorashardError]:
    return [outcome.error for outcome in outcomes if outcome.error is not None]


def _not_taken(
    name: str,
    failed: Sequence[LorashardError],
    undone: Sequence[LorashardError],
    num_servers: int,
) -> ServerError:
    """undone: of servers that did not unload it again."""
    answers = "; ".join(error.message.removesuffix(".") for error in failed)
    hints = dict.fromkeys(error.hint for error in failed if error.hint)
    after = "What was served before still is."
    if undone:
        where = "; ".join(error.message.removesuffix(".") for error in undone)
        after += f" It may have been loaded where it could not be unloaded again: {where}."
    return ServerError(
        f"{name}: {len(failed)} of {num_servers} servers did not take it: {answers}.",
        hint=" ".join((*hints, after)),
        errors=failed,
    )
