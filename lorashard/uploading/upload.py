"""The upload: shards or a plain adapter, and a model card, to the Hub or another URL.

On the Hub this is one commit, so a reader sees the old directory or the new one. Elsewhere the file
without which nobody takes the directory for finished is uploaded last and removed first: of shards the
manifest, of an adapter its config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME, parse_config
from lorashard.adapter.notice import NOTICE
from lorashard.progress import Progress
from lorashard.shards.manifest import Manifest
from lorashard.storage.drivers import is_object_store, put_counted
from lorashard.storage.hub import HubAddress, parse_address, translating_errors
from lorashard.storage.remote import RemoteFolder
from lorashard.storage.small_files import read_small_file
from lorashard.uploading.card import CARD_NAME, format_adapter_card, format_card
from lorashard.uploading.contents import (
    AdapterContent,
    Content,
    ShardsContent,
    Uploaded,
    UploadPlan,
)
from lorashard.uploading.survey import (
    HubFolder,
    check_place,
    folder_of,
    is_on_hub,
    look_on_hub,
    plan_on_hub,
    preview_upload,
    survey_folder,
)

# Several machines may each commit a folder of one repository, and only one of them can be the next.
_COMMITS_TRIED = 8
_WAIT_FOR_OTHERS_S = 0.5


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What goes to the place. notices: files that are not in `directory`. title: of a commit.

    format_card: place -> model card. counted: the names of the files whose bytes are reported.
    """

    directory: Path
    content: Content
    notices: Mapping[str, bytes]
    format_card: Callable[[str], str]
    counted: frozenset[str]
    title: str


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
    ep_size = manifest.placement.ep_size
    parcel = _Parcel(
        shards,
        ShardsContent(ep_size),
        {WEIGHTS_NAME: NOTICE},
        lambda place: format_card(manifest, config, place),
        frozenset(manifest.files),
        f"lorashard push: {ep_size} expert-parallel ranks",
    )
    if dry_run:
        check_place(target)
        return preview_upload(target, parcel.content, force=force)
    return _upload(parcel, target, private, force, progress)


def upload_adapter(
    adapter: Path,
    target: str,
    *,
    private: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Uploaded:
    """The same for a plain adapter: its weights and its config, with a model card.

    force: replace an adapter that is there, on the Hub with a new commit.
    """
    config = parse_config(read_small_file(adapter, CONFIG_NAME), str(adapter / CONFIG_NAME))
    parcel = _Parcel(
        adapter,
        AdapterContent(),
        {},
        lambda place: format_adapter_card(config, place),
        frozenset({WEIGHTS_NAME}),
        "lorashard: a PEFT adapter, made from shards",
    )
    return _upload(parcel, target, private, force, progress)


def _upload(
    parcel: _Parcel, target: str, private: bool, force: bool, progress: Progress
) -> Uploaded:
    if is_on_hub(target):
        return _to_hub(parcel, parse_address(target), private=private, force=force)
    return _to_folder(parcel, folder_of(target), progress, force=force)


def _to_hub(parcel: _Parcel, address: HubAddress, *, private: bool, force: bool) -> Uploaded:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, branch, place = HfApi(), address.revision or "main", str(address)
    with translating_errors(place):
        parent = _head(api, address.repo, branch, private=private)
        there = look_on_hub(api, address, parent)
        plan = plan_on_hub(address, there, parcel.content, force=force)
        operations = _operations(parcel, address, plan)
        for attempt in range(1, _COMMITS_TRIED + 1):
            try:
                done = api.create_commit(
                    address.repo,
                    operations,
                    commit_message=parcel.title,
                    revision=branch,
                    parent_commit=parent,  # the Hub refuses if there is a newer commit
                )
                break
            except HfHubHTTPError as err:
                if err.response.status_code != 412 or attempt == _COMMITS_TRIED:
                    raise
                time.sleep(_WAIT_FOR_OTHERS_S * attempt)
                parent = _head(api, address.repo, branch, private=private)
                if not _is_as_it_was(there, look_on_hub(api, address, parent)):
                    raise
    return Uploaded(place, done.oid, plan.names, plan.removed, plan.keeps_card)


def _is_as_it_was(before: HubFolder, now: HubFolder) -> bool:
    """Whether a commit that came first has changed other folders of the repository only."""
    return before.blobs == now.blobs


def _operations(parcel: _Parcel, address: HubAddress, plan: UploadPlan) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added: dict[str, str | bytes] = {name: str(parcel.directory / name) for name in plan.names}
    added |= parcel.notices
    if not plan.keeps_card:
        added[CARD_NAME] = parcel.format_card(str(address)).encode()
    operations = [CommitOperationAdd(address.within(n), c) for n, c in added.items()]
    return operations + [CommitOperationDelete(address.within(name)) for name in plan.removed]


def _head(api: Any, repo: str, branch: str, *, private: bool) -> str:
    """The branch's last commit; creates the repository and the branch if they do not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(api.model_info(repo, revision=branch).sha)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private, exist_ok=True)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch, exist_ok=True)
        return str(api.model_info(repo, revision=branch).sha)
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
    return str(api.model_info(repo, revision=branch).sha)


def _to_folder(
    parcel: _Parcel, folder: RemoteFolder, progress: Progress, *, force: bool
) -> Uploaded:
    fs, path, place = folder.fs, folder.path, folder.text
    with translating_errors(place):
        plan = survey_folder(folder, parcel.content, force=force)
        *first, last = plan.names
        if plan.replaces and fs.exists(f"{path}/{last}"):  # not of an interrupted upload
            fs.rm_file(f"{path}/{last}")
        if not is_object_store(fs):  # it needs no folders, and s3fs would create a missing bucket
            fs.makedirs(path, exist_ok=True)
        for name in first:
            counted = progress if name in parcel.counted else lambda _: None
            put_counted(fs, parcel.directory / name, f"{path}/{name}", counted)
        for name, content in parcel.notices.items():
            fs.pipe_file(f"{path}/{name}", content)
        if not plan.keeps_card:
            fs.pipe_file(f"{path}/{CARD_NAME}", parcel.format_card(place).encode())
        for name in plan.removed:
            fs.rm_file(f"{path}/{name}")
        fs.put_file(str(parcel.directory / last), f"{path}/{last}")
    return Uploaded(place, None, plan.names, plan.removed, plan.keeps_card)
