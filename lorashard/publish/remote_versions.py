"""Versions of an adapter elsewhere: a commit with a tag for each on the Hub, else a folder for each.

In: a version's local directory. Out: the place that `lorashard pull` takes; and of the folders, those
that are no longer kept are removed. On the Hub nothing is removed: its history keeps all versions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import LorashardError, OutputExistsError
from lorashard.publish.versions import outdated, version_name, version_of
from lorashard.shards.directory import manifest_bytes, read_manifest
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME
from lorashard.storage.drivers import is_object_store
from lorashard.storage.hub import HubAddress, parse_address, translating_errors
from lorashard.storage.remote import RemoteFolder, locate, open_url
from lorashard.uploading.card import CARD_NAME, is_untouched
from lorashard.uploading.contents import RANK_FILE
from lorashard.uploading.survey import is_on_hub, names_at
from lorashard.uploading.upload import upload_shards

_OWN_NAMES = frozenset({MANIFEST_NAME, CONFIG_NAME, REPLICATED_NAME, CARD_NAME})


@dataclass(frozen=True, slots=True)
class RemoteVersions:
    """target: a Hub id, hf://owner/name[@branch][/folder], or another URL. name: the adapter's.

    private: make a repository that is created private.
    """

    target: str
    name: str
    private: bool

    def check(self) -> None:
        """Raise ValueError unless the target is on the Hub or a URL."""
        if not is_on_hub(self.target) and "://" not in self.target:
            raise ValueError(f"{self.target}: neither hf://owner/name nor another URL")

    def upload(self, shards: Path, version: int) -> str:
        """Upload a version, unless it is there. Where it is.

        Raises OutputExistsError if another one has its name, AdapterError for a place that does not
        answer or refuses access.
        """
        name = version_name(self.name, version)
        if is_on_hub(self.target):
            return self._to_hub(shards, parse_address(self.target), name)
        place = f"{self.target.rstrip('/')}/{name}"
        folder = locate(place)
        assert isinstance(folder, RemoteFolder), "only a Hub address can be a local directory"
        if folder.file(MANIFEST_NAME) is None:
            upload_shards(shards, read_manifest(shards), place)
        else:
            _check_same(shards, folder)
        return place

    def remove_outdated(self, newest: int, keep: int) -> tuple[str, ...]:
        """Remove the folders of the versions before the last `keep`. Why some are left, a line each."""
        if is_on_hub(self.target):
            return ()
        left = []
        try:
            folder = open_url(self.target)
            assert isinstance(folder, RemoteFolder), "only a Hub address can be a local directory"
            found = (version_of(self.name, name) for name in folder.folders())
            present = {version for version in found if version is not None}
            for version in outdated(newest, present, present, keep):
                name = version_name(self.name, version)
                with translating_errors(f"{self.target}/{name}"):
                    if not _remove_folder(folder.child(name)):
                        left.append(f"{folder}/{name}: holds something else than shards")
        except LorashardError as err:
            left.append(err.message)
        return tuple(left)

    def _to_hub(self, shards: Path, address: HubAddress, name: str) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        api, tagged = HfApi(), replace(address, revision=name)
        with translating_errors(str(tagged)):
            try:
                api.model_info(address.repo, revision=name)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                done = upload_shards(
                    shards, read_manifest(shards), str(address), private=self.private
                )
                api.create_tag(address.repo, tag=name, revision=done.revision)
            else:
                _check_same(shards, locate(str(tagged)))
        return str(tagged)


def _check_same(shards: Path, place: RemoteFolder | Path) -> None:
    """Raise OutputExistsError unless the shards at a place are these."""
    if manifest_bytes(place) != manifest_bytes(shards):
        raise OutputExistsError(
            str(place),
            reason="holds another version under this name",
            hint="Publish under the next version's number.",
        )


def _remove_folder(folder: RemoteFolder) -> bool:
    """Remove shards, finished or not; False if there is anything else, which then stays as it is.

    The manifest goes first: without it nobody takes the rest for finished.
    """
    fs: Any = folder.fs
    names = folder.files()
    if folder.folders() or not all(
        name in _OWN_NAMES or RANK_FILE.fullmatch(name) for name in names_at(fs, folder.path)
    ):
        return False
    if CARD_NAME in names:
        card = fs.cat_file(f"{folder.path}/{CARD_NAME}").decode("utf-8", "replace")
        if not is_untouched(card):
            return False
    for name in sorted(names, key=lambda name: name != MANIFEST_NAME):
        fs.rm_file(f"{folder.path}/{name}")
    if not is_object_store(fs):
        fs.rmdir(folder.path)
    return True
