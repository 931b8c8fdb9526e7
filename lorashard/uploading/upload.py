"""The upload: the files of a shard directory and its model card, to the Hub or another URL.

On the Hub this is one commit, so a reader sees the old directory or the new one. Elsewhere the
manifest is uploaded last and removed first: without it nobody takes a directory for finished.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME, LoraConfig, parse_config
from lorashard.adapter.notice import NOTICE
from lorashard.progress import Progress
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.drivers import is_object_store, put_counted
from lorashard.storage.hub import HubAddress, parse_address, translating_errors
from lorashard.storage.remote import RemoteFolder
from lorashard.storage.small_files import read_small_file
from lorashard.uploading.card import CARD_NAME, format_card
from lorashard.uploading.survey import (
    Uploaded,
    folder_of,
    is_on_hub,
    preview_upload,
    survey_folder,
    survey_hub,
)


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
    if dry_run:
        return preview_upload(target, manifest.placement.ep_size, force=force)
    if is_on_hub(target):
        return _to_hub(shards, manifest, config, parse_address(target), private=private)
    return _to_folder(shards, manifest, config, folder_of(target), progress, force=force)


def _to_hub(
    shards: Path, manifest: Manifest, config: LoraConfig, address: HubAddress, *, private: bool
) -> Uploaded:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, branch, place = HfApi(), address.revision or "main", str(address)
    with translating_errors(place):
        parent = _head(api, address.repo, branch, private=private)
        plan = survey_hub(api, address, parent, manifest.placement.ep_size)
        added: dict[str, str | bytes] = {name: str(shards / name) for name in plan.names}
        added[WEIGHTS_NAME] = NOTICE
        if not plan.keeps_card:
            added[CARD_NAME] = format_card(manifest, config, place).encode()
        operations = [CommitOperationAdd(address.within(n), c) for n, c in added.items()]
        removals = [CommitOperationDelete(address.within(name)) for name in plan.removed]
        done = api.create_commit(
            address.repo,
            [*operations, *removals],
            commit_message=f"lorashard push: {manifest.placement.ep_size} expert-parallel ranks",
            revision=branch,
            parent_commit=parent,  # the Hub refuses if there is a newer commit
        )
    return Uploaded(place, done.oid, plan.names, plan.removed, plan.keeps_card)


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


def _to_folder(
    shards: Path,
    manifest: Manifest,
    config: LoraConfig,
    folder: RemoteFolder,
    progress: Progress,
    *,
    force: bool,
) -> Uploaded:
    fs, path, place = folder.fs, folder.path, folder.text
    with translating_errors(place):
        plan = survey_folder(folder, manifest.placement.ep_size, force=force)
        if plan.replaces:
            fs.rm_file(f"{path}/{MANIFEST_NAME}")
        if not is_object_store(fs):  # it needs no folders, and s3fs would create a missing bucket
            fs.makedirs(path, exist_ok=True)
        for name in plan.names[:-1]:
            counted = progress if name in manifest.files else lambda _: None
            put_counted(fs, shards / name, f"{path}/{name}", counted)
        fs.pipe_file(f"{path}/{WEIGHTS_NAME}", NOTICE)
        if not plan.keeps_card:
            fs.pipe_file(f"{path}/{CARD_NAME}", format_card(manifest, config, place).encode())
        for name in plan.removed:
            fs.rm_file(f"{path}/{name}")
        fs.put_file(str(shards / MANIFEST_NAME), f"{path}/{MANIFEST_NAME}")
    return Uploaded(place, None, plan.names, plan.removed, plan.keeps_card)
