"""What is at a place already, and what an upload there would do. Only looks.

In: a target, and the number of ranks, from which the names of the files follow. Out: an `UploadPlan`, or
the error that the upload would end with, so that `split` can ask before it begins.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.adapter.notice import NOTICES, is_notice, may_be_notice
from lorashard.errors import AdapterError, OutputExistsError
from lorashard.shards.names import MANIFEST_NAME, shard_file_names
from lorashard.storage.drivers import lacks_bucket
from lorashard.storage.hub import HubAddress, looks_like_hub_id, parse_address, translating_errors
from lorashard.storage.remote import RemoteFolder, open_url
from lorashard.uploading.card import CARD_NAME, is_untouched

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
class UploadPlan:
    """names: files to upload, the manifest last. removed: files of another placement to delete there.

    keeps_card: whether the place has a model card that someone has edited.
    replaces: whether there is a finished shard directory.
    """

    names: tuple[str, ...]
    removed: tuple[str, ...]
    keeps_card: bool
    replaces: bool


def is_on_hub(target: str) -> bool:
    """Whether a target is hf://owner/name or owner/name."""
    return target.startswith("hf://") or looks_like_hub_id(target)


def preview_upload(target: str, ep_size: int, *, force: bool = False) -> Uploaded:
    """What an upload of `ep_size` ranks to `target` would do. Changes nothing there.

    force: as upload_shards has it. Raises what the upload would raise, as far as can be known without
    writing: OutputExistsError, or AdapterError for a place that does not answer, that does not exist
    or for which no token is set.
    """
    if is_on_hub(target):
        from huggingface_hub import HfApi

        api, address = HfApi(), parse_address(target)
        with translating_errors(str(address)):
            _check_token(api, str(address))
            head = _present_head(api, address.repo, address.revision or "main")
            plan = survey_hub(api, address, head, ep_size)
        return Uploaded(str(address), None, plan.names, plan.removed, plan.keeps_card)
    folder = folder_of(target)
    with translating_errors(folder.text):
        if lacks_bucket(folder.fs, folder.path):
            raise AdapterError(
                f"{folder}: there is no bucket {folder.path.partition('/')[0]}.",
                hint="Create it, or choose another place.",
            )
        plan = survey_folder(folder, ep_size, force=force)
    return Uploaded(folder.text, None, plan.names, plan.removed, plan.keeps_card)


def folder_of(target: str) -> RemoteFolder:
    """The folder of a target that is not on the Hub. Raises AdapterError."""
    if "://" not in target:
        raise AdapterError(f"{target}: neither hf://owner/name nor another URL.")
    folder = open_url(target.rstrip("/"))
    assert isinstance(folder, RemoteFolder), "only a Hub address can be a local directory"
    return folder


def survey_hub(api: Any, address: HubAddress, commit: str | None, ep_size: int) -> UploadPlan:
    """The plan for a folder of a repository. commit: None for one that does not exist.

    Raises OutputExistsError, or what the Hub's client raises.
    """
    present = frozenset() if commit is None else _names_on_hub(api, address, commit)
    card = None
    if CARD_NAME in present:
        copy = api.hf_hub_download(address.repo, address.within(CARD_NAME), revision=commit)
        card = Path(copy).read_text("utf-8", "replace")
    return _plan_upload(str(address), present, card, ep_size)


def survey_folder(folder: RemoteFolder, ep_size: int, *, force: bool) -> UploadPlan:
    """The plan for a folder elsewhere. Raises OutputExistsError, or what the driver raises."""
    present = names_at(folder.fs, folder.path)
    card = None
    if CARD_NAME in present:
        card = folder.fs.cat_file(f"{folder.path}/{CARD_NAME}").decode("utf-8", "replace") or None
    plan = _plan_upload(folder.text, present, card, ep_size)
    if plan.replaces and not force:
        raise OutputExistsError(
            folder.text, reason="exists", hint="`force=True` replaces it. Or choose another place."
        )
    return plan


def names_at(fs: Any, path: str) -> frozenset[str]:
    """The names in a folder elsewhere, except that of the notice."""
    try:
        entries = fs.ls(path, detail=False, refresh=True)
    except FileNotFoundError:
        return frozenset()
    names = frozenset(entry.rstrip("/").rpartition("/")[2] for entry in entries)
    weights = f"{path}/{WEIGHTS_NAME}"
    if WEIGHTS_NAME not in names:
        return names
    size = fs.size(weights)  # none: an upload to a file system ended before it wrote the notice
    is_ours = size == 0 or (may_be_notice(size) and fs.cat_file(weights) in NOTICES)
    return names - {WEIGHTS_NAME} if is_ours else names


def _check_token(api: Any, place: str) -> None:
    """Raise AdapterError for a token that may only read; the client's error without a valid one."""
    token = api.whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise AdapterError(
            f"{place}: the token {token.get('displayName', '')!r} may only read.",
            hint="Set HF_TOKEN to a token that allows this, or run `hf auth login`.",
        )


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


def _plan_upload(
    place: str, present: Collection[str], card: str | None, ep_size: int
) -> UploadPlan:
    """What to do, given the names at `place` and its model card.

    Raises OutputExistsError if there is an adapter.
    """
    if WEIGHTS_NAME in present or PICKLE_NAME in present:
        raise OutputExistsError(
            place,
            reason="already holds an adapter, whose adapter_config.json would be replaced",
            hint=f"Choose another place, for example {place}/ep{ep_size}.",
        )
    names = (CONFIG_NAME, *shard_file_names(ep_size), MANIFEST_NAME)
    stale = (name for name in present if RANK_FILE.fullmatch(name) and name not in names)
    keeps_card = card is not None and not is_untouched(card)
    return UploadPlan(names, tuple(sorted(stale)), keeps_card, MANIFEST_NAME in present)
