"""The upload: the files of a shard directory and its model card, to the Hub or another URL.

On the Hub this is one commit, so a reader sees the old directory or the new one. Elsewhere the
manifest is uploaded last and removed first: without it nobody takes a directory for finished.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    LoraConfig,
    parse_config,
)
from lorashard.adapter.notice import NOTICE, NOTICES, is_notice, may_be_notice
from lorashard.errors import AdapterError, OutputExistsError
from lorashard.progress import Progress
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.drivers import is_object_store, put_counted
from lorashard.storage.hub import HubAddress, looks_like_hub_id, parse_address, translating_errors
from lorashard.storage.remote import RemoteFolder, open_url
from lorashard.storage.small_files import read_small_file
from lorashard.uploading.card import CARD_NAME, format_card, is_untouched

RANK_FILE = re.compile(r"ep-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was done, or would be. revision: the commit on the Hub, of a dry run None. removed: files of another placement.

    kept_card: whether the place had a model card that someone had edited, so that it was left alone.
    """

    place: str
    revision: str | None
    names: tuple[str, ...]
    removed: tuple[str, ...]
    kept_card: bool


@dataclass(frozen=True, slots=True)
class _UploadPlan:
    """names: files to upload, the manifest last. card: a new model card, or None to keep the old one.

    removed: files of another placement to delete there.
    """

    names: tuple[str, ...]
    card: str | None
    removed: tuple[str, ...]


def upload_shards(
    shards: Path,
    manifest: Manifest,
    target: str,
    *,
    private: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> Uploaded:
    """Upload the shard directory `shards`, which has been checked, with a model card.

    target: hf://owner/name[@branch][/folder], created if it does not exist, or another URL.
    private: make a repository that is created private. force: replace shards at a URL; on the Hub
    the history keeps the old ones. dry_run: only look at the target, and say what would be done.
    progress: called with the bytes of shard files that were uploaded since the last call; for the Hub
    huggingface_hub shows its own.
    Raises ShardError, or AdapterError for a place that does not answer or refuses access.
    """
    config = parse_config(read_small_file(shards, CONFIG_NAME), str(shards / CONFIG_NAME))
    if is_on_hub(target):
        address = parse_address(target)
        return _to_hub(shards, manifest, config, address, private=private, dry_run=dry_run)
    if "://" not in target:
        raise AdapterError(f"{target}: neither hf://owner/name nor another URL.")
    place = target.rstrip("/")
    return _to_url(shards, manifest, config, place, progress, force=force, dry_run=dry_run)


def is_on_hub(target: str) -> bool:
    """Whether a target is hf://owner/name or owner/name."""
    return target.startswith("hf://") or looks_like_hub_id(target)


def _to_hub(
    shards: Path,
    manifest: Manifest,
    config: LoraConfig,
    address: HubAddress,
    *,
    private: bool,
    dry_run: bool,
) -> Uploaded:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, branch, place = HfApi(), address.revision or "main", str(address)
    with translating_errors(place):
        if dry_run:
            parent = _present_head(api, address.repo, branch)
        else:
            parent = _head(api, address.repo, branch, private=private)
        present = frozenset() if parent is None else _names_on_hub(api, address, parent)
        old_card = None
        if CARD_NAME in present:
            copy = api.hf_hub_download(address.repo, address.within(CARD_NAME), revision=parent)
            old_card = Path(copy).read_text("utf-8", "replace")
        upload = _plan_upload(manifest, config, place, present, old_card)
        if dry_run:
            return Uploaded(place, None, upload.names, upload.removed, upload.card is None)
        added: dict[str, str | bytes] = {name: str(shards / name) for name in upload.names}
        added[WEIGHTS_NAME] = NOTICE
        if upload.card is not None:
            added[CARD_NAME] = upload.card.encode()
        operations = [CommitOperationAdd(address.within(n), c) for n, c in added.items()]
        removals = [CommitOperationDelete(address.within(name)) for name in upload.removed]
        done = api.create_commit(
            address.repo,
            [*operations, *removals],
            commit_message=f"lorashard push: {manifest.placement.ep_size} expert-parallel ranks",
            revision=branch,
            parent_commit=parent,  # the Hub refuses if there is a newer commit
        )
    return Uploaded(place, done.oid, upload.names, upload.removed, upload.card is None)


def _head(api: Any, repo: str, branch: str, *, private: bool) -> str:
    """The branch's last commit; creates the repository and the branch if they do not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(api.model_info(repo, revision=branch).sha)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch)
        return str(api.model_info(repo, revision=branch).sha)
    if branch != "main":
        api.create_branch(repo, branch=branch)
    return str(api.model_info(repo, revision=branch).sha)


def _present_head(api: Any, repo: str, branch: str) -> str | None:
    """The commit that the branch has, or would begin with; None for a repository that is new."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(api.model_info(repo, revision=branch).sha)
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        return str(api.model_info(repo).sha)


def _names_on_hub(api: Any, address: HubAddress, commit: str) -> frozenset[str]:
    """The names in the folder, except that of the notice."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        tree = api.list_repo_tree(address.repo, address.folder or None, revision=commit)
        sizes = {e.path.rpartition("/")[2]: getattr(e, "size", None) for e in tree}
    except EntryNotFoundError:
        return frozenset()
    if may_be_notice(sizes.get(WEIGHTS_NAME)):
        weights = address.within(WEIGHTS_NAME)
        if is_notice(Path(api.hf_hub_download(address.repo, weights, revision=commit))):
            del sizes[WEIGHTS_NAME]
    return frozenset(sizes)


def _to_url(
    shards: Path,
    manifest: Manifest,
    config: LoraConfig,
    place: str,
    progress: Progress,
    *,
    force: bool,
    dry_run: bool,
) -> Uploaded:
    folder = open_url(place)
    assert isinstance(folder, RemoteFolder), "only a Hub address can be a local directory"
    fs, path = folder.fs, folder.path
    with translating_errors(place):
        present = names_at(fs, path)
        card = (
            fs.cat_file(f"{path}/{CARD_NAME}").decode("utf-8", "replace")
            if CARD_NAME in present
            else None
        )
        upload = _plan_upload(manifest, config, place, present, card)
        if MANIFEST_NAME in present and not force:
            raise OutputExistsError(
                place, reason="exists", hint="`force=True` replaces it. Or choose another place."
            )
        if dry_run:
            return Uploaded(place, None, upload.names, upload.removed, upload.card is None)
        if MANIFEST_NAME in present:
            fs.rm_file(f"{path}/{MANIFEST_NAME}")
        if not is_object_store(fs):  # it needs no folders, and s3fs would create a missing bucket
            fs.makedirs(path, exist_ok=True)
        for name in upload.names[:-1]:
            counted = progress if name in manifest.files else lambda _: None
            put_counted(fs, shards / name, f"{path}/{name}", counted)
        fs.pipe_file(f"{path}/{WEIGHTS_NAME}", NOTICE)
        if upload.card is not None:
            fs.pipe_file(f"{path}/{CARD_NAME}", upload.card.encode())
        for name in upload.removed:
            fs.rm_file(f"{path}/{name}")
        fs.put_file(str(shards / MANIFEST_NAME), f"{path}/{MANIFEST_NAME}")
    return Uploaded(place, None, upload.names, upload.removed, upload.card is None)


def names_at(fs: Any, path: str) -> frozenset[str]:
    """The names in a folder elsewhere, except that of the notice."""
    try:
        entries = fs.ls(path, detail=False, refresh=True)
    except FileNotFoundError:
        return frozenset()
    names = frozenset(entry.rstrip("/").rpartition("/")[2] for entry in entries)
    weights = f"{path}/{WEIGHTS_NAME}"
    if WEIGHTS_NAME in names and may_be_notice(fs.size(weights)):
        return names - {WEIGHTS_NAME} if fs.cat_file(weights) in NOTICES else names
    return names


def _plan_upload(
    manifest: Manifest, config: LoraConfig, place: str, present: Collection[str], card: str | None
) -> _UploadPlan:
    """What to do, given the names at `place` and its model card.

    Raises OutputExistsError if there is an adapter.
    """
    if WEIGHTS_NAME in present or PICKLE_NAME in present:
        raise OutputExistsError(
            place,
            reason="already holds an adapter, whose adapter_config.json would be replaced",
            hint=f"Choose another place, for example {place}/ep{manifest.placement.ep_size}.",
        )
    names = (CONFIG_NAME, *manifest.files, MANIFEST_NAME)
    stale = (name for name in present if RANK_FILE.fullmatch(name) and name not in names)
    replaces_card = card is None or is_untouched(card)
    new_card = format_card(manifest, config, place) if replaces_card else None
    return _UploadPlan(names, new_card, tuple(sorted(stale)))
