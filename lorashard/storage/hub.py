"""What names a place on the Hugging Face Hub, and what to do about its errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorashard.errors import AdapterError, LorashardError

_HINT = "hf://owner/name[@revision]"
# What the Hub calls a repository, with a revision or a folder in it: owner/name[@revision][/folder].
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[^/@]+)?(/[^@]+)?")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A folder of a repository; revision: a branch, tag or commit, or None for the main one."""

    repo: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.folder}".rstrip("/")

    def within(self, name: str) -> str:
        """The path in the repository of a file of the folder."""
        return f"{self.folder}/{name}".lstrip("/")


def last_name(place: str) -> str:
    """The last part of a place's name, without a revision: what a local copy would be called."""
    return place.rstrip("/").rpartition("/")[2].partition("@")[0]


def looks_like_hub_id(text: str) -> bool:
    """Whether `text`, which is no URL, could be owner/name[@revision][/folder]."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith((".", "-"))


def parse_address(text: str) -> HubAddress:
    """hf://owner/name[@revision][/folder], by huggingface_hub's own parser where it has one (>= 1.0).

    Raises AdapterError.
    """
    path = text.removeprefix("hf://")
    try:
        from huggingface_hub import parse_hf_uri
    except ImportError:
        found = re.fullmatch(r"(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", path)
        if found is None:
            raise AdapterError(f"{text}: not {_HINT}.") from None
        return HubAddress(found[1], found[2], (found[3] or "").strip("/"))
    try:
        parsed = parse_hf_uri(f"hf://{path}")
    except Exception as err:
        raise AdapterError(f"{text}: {summarize_error(err)}.", hint=_HINT) from err
    if getattr(parsed, "is_bucket", False) or parsed.type != "model":
        raise AdapterError(f"{text}: not a model repository.", hint=_HINT)
    return HubAddress(parsed.id, parsed.revision, (parsed.path_in_repo or "").strip("/"))


@contextmanager
def translating_errors(place: str) -> Iterator[None]:
    """What the Hub or a driver raises inside becomes an AdapterError that says what to do."""
    try:
        yield
    except LorashardError:
        raise
    except Exception as err:
        raise access_error(place, err) from err


def access_error(shown: str, err: Exception) -> AdapterError:
    """Says what to do about what the Hub or a driver raised."""
    hints = {
        "RepositoryNotFoundError": "Is the name right? A private one needs HF_TOKEN or `hf auth login`.",
        "GatedRepoError": "Ask for access on its page, and set HF_TOKEN or `hf auth login`.",
        "RevisionNotFoundError": "Is the revision right? A branch, a tag or a commit.",
        "LocalEntryNotFoundError": "HF_HUB_OFFLINE is set and the Hub's cache has it not, or not whole.",
        "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for what is public, FSSPEC_S3_ANON=true.",
        "PermissionError": "Are the credentials right, and may they do this there?",
        "LocalTokenNotFoundError": "Set HF_TOKEN or `hf auth login`.",
    }  # fmt: skip
    names = [cls.__name__ for cls in type(err).__mro__]
    hint = next((hints[name] for name in names if name in hints), None)
    status = getattr(getattr(err, "response", None), "status_code", None)
    if hint is None and status in (401, 403):
        hint = "HF_TOKEN, or `hf auth login`, needs a token that may do this."
    if hint is None and status == 412:
        hint = "It was changed meanwhile; run it again."
    return AdapterError(
        f"{shown}: {summarize_error(err)}.", hint=hint or "Is the place right, and up?"
    )


def summarize_error(err: Exception) -> str:
    """The first line of an error, with its kind."""
    first = str(err).strip().splitlines()[0] if str(err).strip() else ""
    return f"{type(err).__name__}: {first}".rstrip(". :")[:300]
