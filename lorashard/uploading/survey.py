"""What is at a place already, and what an upload there would do. Only looks.

In: a target, and what is to be uploaded. Out: an `UploadPlan`, or the error that the upload would end
with, so that a command can ask before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.adapter.notice import NOTICES, is_notice, may_be_notice
from lorashard.errors import AdapterError, OutputExistsError
from lorashard.storage.drivers import lacks_bucket
from lorashard.storage.hub import (
    HubAddress,
    address_of_page,
    looks_like_hub_id,
    parse_address,
    translating_errors,
)
from lorashard.storage.remote import RemoteFolder, open_url
from lorashard.uploading.card import CARD_NAME
from lorashard.uploading.contents import Content, Uploaded, UploadPlan


@dataclass(frozen=True, slots=True)
class HubFolder:
    """What is in a folder of a repository. blobs: names with a text that changes with the content.

    names: those without the notice. card: of the model card that is there.
    """

    names: frozenset[str]
    card: str | None
    blobs: frozenset[tuple[str, str]]


def is_on_hub(target: str) -> bool:
    """Whether a target is hf://owner/name or owner/name, or a model's page."""
    is_page = address_of_page(target) is not None
    return is_page or target.startswith("hf://") or looks_like_hub_id(target)


def check_place(target: str) -> None:
    """Raise AdapterError for a place that does not answer, does not exist or may not be written.

    As far as can be known without writing: on the Hub the token is asked for, which it does not like
    to be asked often; of a bucket, whether it exists.
    """
    if is_on_hub(target):
        from huggingface_hub import HfApi

        place = str(parse_address(target))
        with translating_errors(place):
            _check_token(HfApi(), place)
        return
    folder = folder_of(target)
    with translating_errors(folder.text):
        if lacks_bucket(folder.fs, folder.path):
            raise AdapterError(
                f"{folder}: there is no bucket {folder.path.partition('/')[0]}.",
                hint="Create it, or choose another place.",
            )


def preview_upload(target: str, content: Content, *, force: bool = False) -> Uploaded:
    """What an upload to `target` would do. Changes nothing there.

    force: as upload_shards has it. Raises what the upload would raise, as far as a look shows it:
    OutputExistsError, or AdapterError for a place that does not answer.
    """
    if is_on_hub(target):
        from huggingface_hub import HfApi

        api, address = HfApi(), parse_address(target)
        with translating_errors(str(address)):
            head = _present_head(api, address.repo, address.revision or "main")
            plan = plan_on_hub(address, look_on_hub(api, address, head), content, force=force)
        return Uploaded(str(address), None, plan.names, plan.removed, plan.keeps_card)
    folder = folder_of(target)
    with translating_errors(folder.text):
        plan = survey_folder(folder, content, force=force)
    return Uploaded(folder.text, None, plan.names, plan.removed, plan.keeps_card)


def folder_of(target: str) -> RemoteFolder:
    """The folder of a target that is not on the Hub. Raises AdapterError."""
    if "://" not in target:
        raise AdapterError(f"{target}: neither hf://owner/name nor another URL.")
    folder = open_url(target.rstrip("/"))
    assert isinstance(folder, RemoteFolder), "only a Hub address can be a local directory"
    return folder


def look_on_hub(api: Any, address: HubAddress, commit: str | None) -> HubFolder:
    """What is in the folder. commit: None for a repository that does not exist.

    Raises what the Hub's client raises.
    """
    from huggingface_hub.errors import EntryNotFoundError

    if commit is None:
        return HubFolder(frozenset(), None, frozenset())
    try:
        tree = list(api.list_repo_tree(address.repo, address.folder or None, revision=commit))
    except EntryNotFoundError:
        return HubFolder(frozenset(), None, frozenset())
    # Folders have no blob; that of a file names its content.
    blobs = {e.path.rpartition("/")[2]: e.blob_id for e in tree if hasattr(e, "blob_id")}
    sizes = {e.path.rpartition("/")[2]: getattr(e, "size", None) for e in tree}

    def copy_of(name: str) -> Path:
        return Path(api.hf_hub_download(address.repo, address.within(name), revision=commit))

    card = copy_of(CARD_NAME).read_text("utf-8", "replace") if CARD_NAME in sizes else None
    if may_be_notice(sizes.get(WEIGHTS_NAME)) and is_notice(copy_of(WEIGHTS_NAME)):
        del sizes[WEIGHTS_NAME]
    return HubFolder(frozenset(sizes), card, frozenset(blobs.items()))


def plan_on_hub(
    address: HubAddress, there: HubFolder, content: Content, *, force: bool
) -> UploadPlan:
    """The plan for a folder of a repository. Raises OutputExistsError."""
    plan = content.plan(str(address), there.names, there.card)
    if plan.replaces and not (force or content.replaces_on_hub):
        raise OutputExistsError(
            str(address),
            reason="exists",
            hint="`force=True` replaces it with a new commit; the history keeps it. Or choose "
            "another place.",
        )
    return plan


def survey_folder(folder: RemoteFolder, content: Content, *, force: bool) -> UploadPlan:
    """The plan for a folder elsewhere. Raises OutputExistsError, or what the driver raises."""
    present = names_at(folder.fs, folder.path)
    card = None
    if CARD_NAME in present:
        card = folder.fs.cat_file(f"{folder.path}/{CARD_NAME}").decode("utf-8", "replace") or None
    plan = content.plan(folder.text, present, card)
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
