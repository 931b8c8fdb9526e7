"""Names of places on the Hugging Face Hub, and its errors in our words.

In: what a user named, or an exception of huggingface_hub's, fsspec's or a driver's. Out: a
`HubAddress`, or an AdapterError that says what to do. Nothing here sends a request.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lorashard.errors import AdapterError, LorashardError

_FORM = "hf://owner/name[@revision]"
# owner/name[@revision][/folder]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[^/@]+)?(/[^@]+)?")
_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/tree/(?P<revision>[^/?#]+)(?:/(?P<folder>[^?#]*))?)?/?"
)
_NO_MODELS = ("datasets/", "spaces/", "collections/", "papers/", "docs/", "buckets/")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A folder of a repository. revision: a branch, tag or commit; None for the main branch."""

    repo: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.folder}".rstrip("/")

    def within(self, name: str) -> str:
        """The path of a file of this folder in the repository."""
        return f"{self.folder}/{name}".lstrip("/")


def last_name(place: str) -> str:
    """The last part of a place's name without its revision: what to call a local copy."""
    return place.rstrip("/").rpartition("/")[2].partition("@")[0]


def address_of_page(url: str) -> str | None:
    """hf://owner/name[@revision][/folder] of a model's page, as a browser shows it; else None."""
    page = _PAGE.fullmatch(url)
    if page is None or page["repo"].startswith(_NO_MODELS):
        return None
    revision = f"@{page['revision']}" if page["revision"] else ""
    return f"hf://{page['repo']}{revision}/{page['folder'] or ''}".rstrip("/")


def looks_like_hub_id(text: str) -> bool:
    """Whether `text`, which is no URL, could be owner/name[@revision][/folder]."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith((".", "-"))


def parse_address(text: str) -> HubAddress:
    """Parse hf://owner/name[@revision][/folder], with huggingface_hub's parser if it has one (1.0).

    Raises AdapterError.
    """
    path = (address_of_page(text) or text).removeprefix("hf://")
    try:
        from huggingface_hub import parse_hf_uri
    except ImportError:
        match = re.fullmatch(r"(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", path)
        if match is None:
            raise AdapterError(f"{text}: not {_FORM}.") from None
        return HubAddress(match[1], match[2], (match[3] or "").strip("/"))
    try:
        parsed = parse_hf_uri(f"hf://{path}")
    except Exception as err:
        raise AdapterError(
            f"{text}: {summarize_error(err)}.", hint=f"Write it as {_FORM}."
        ) from err
    if getattr(parsed, "is_bucket", False) or parsed.type != "model":
        raise AdapterError(f"{text}: not a model repository.", hint=f"Write it as {_FORM}.")
    return HubAddress(parsed.id, parsed.revision, (parsed.path_in_repo or "").strip("/"))


@contextmanager
def translating_errors(place: str) -> Iterator[None]:
    """An error of the Hub or a driver in the block becomes an AdapterError that says what to do."""
    try:
        yield
    except LorashardError:
        raise
    except Exception as err:
        raise access_error(place, err) from err


# By the name of the exception's class, so that no driver has to be imported for it.
_HINTS = {
    "RepositoryNotFoundError": "Is the name right? For a private repository set HF_TOKEN or run `hf auth login`.",
    "GatedRepoError": "Request access on its page, then set HF_TOKEN or run `hf auth login`.",
    "RevisionNotFoundError": "Is the revision right? It must be a branch, a tag or a commit.",
    "LocalEntryNotFoundError": "HF_HUB_OFFLINE is set and the file is missing from (or incomplete in) the local Hub cache.",
    "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE. For public data set FSSPEC_S3_ANON=true.",
    "PermissionError": "Are the credentials right, and do they allow this?",
    "LocalTokenNotFoundError": "Set HF_TOKEN or run `hf auth login`.",
}  # fmt: skip
_HINTS_BY_STATUS: Mapping[int | None, str] = {
    401: "Set HF_TOKEN to a token that allows this, or run `hf auth login`.",
    403: "Set HF_TOKEN to a token that allows this, or run `hf auth login`.",
    412: "Someone else changed it at the same time; run it again.",
}


def access_error(shown: str, err: Exception) -> AdapterError:
    """What to do about an error of the Hub or a driver. shown: the place, as the user named it."""
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return AdapterError(f"{shown}: no space left there.", hint="Free some, and try again.")
    names = [cls.__name__ for cls in type(err).__mro__]
    hint = next((_HINTS[name] for name in names if name in _HINTS), None)
    if hint is None:
        status = getattr(getattr(err, "response", None), "status_code", None)
        hint = _HINTS_BY_STATUS.get(
            status or 0, "Is the address right, and is the server reachable?"
        )
    return AdapterError(f"{shown}: {summarize_error(err)}.", hint=hint)


def summarize_error(err: Exception) -> str:
    """The class of an error and its first line, in 300 characters at most."""
    first = str(err).strip().splitlines()[0] if str(err).strip() else ""
    return f"{type(err).__name__}: {first}".rstrip(". :")[:300]
