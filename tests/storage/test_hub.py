"""Names of places on the Hub, and what is said about its errors."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorashard.errors import AdapterError, LayoutError
from lorashard.storage.hub import (
    HubAddress,
    access_error,
    address_of_page,
    last_name,
    looks_like_hub_id,
    parse_address,
    translating_errors,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://owner/name", HubAddress("owner/name", None, "")),
        ("owner/name", HubAddress("owner/name", None, "")),
        ("hf://owner/name/", HubAddress("owner/name", None, "")),
        ("hf://owner/name@v1", HubAddress("owner/name", "v1", "")),
        ("hf://owner/name/runs/ep2", HubAddress("owner/name", None, "runs/ep2")),
        ("hf://owner/name@main/ep2", HubAddress("owner/name", "main", "ep2")),
        ("https://huggingface.co/owner/name", HubAddress("owner/name", None, "")),
        ("https://huggingface.co/owner/name/", HubAddress("owner/name", None, "")),
        ("https://hf.co/owner/name/tree/v1", HubAddress("owner/name", "v1", "")),
        (
            "https://huggingface.co/owner/name/tree/v1/runs/ep2/",
            HubAddress("owner/name", "v1", "runs/ep2"),
        ),
    ],
)
def test_an_address_has_a_repository_a_revision_and_a_folder(
    text: str, address: HubAddress
) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/datasets/owner",
        "https://huggingface.co/owner/name/resolve/main/a.json",
        "https://huggingface.co.example.org/owner/name",
        "https://huggingface.co/owner/name?x=1",
        "https://example.org/owner/name",
        "hf://owner/name",
    ],
)
def test_what_is_no_page_of_a_model_is_not_taken_for_one(url: str) -> None:
    assert address_of_page(url) is None


@pytest.mark.parametrize("text", ["hf://owner", "hf://", "hf://datasets/owner/name"])
def test_what_is_no_model_repository_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(AdapterError) as raised:
        parse_address(text)
    assert "hf://owner/name[@revision]" in str(raised.value)


@pytest.mark.parametrize(
    ("address", "text", "file"),
    [
        (HubAddress("o/n", None, ""), "hf://o/n", "README.md"),
        (HubAddress("o/n", "v1", ""), "hf://o/n@v1", "README.md"),
        (HubAddress("o/n", "v1", "a/b"), "hf://o/n@v1/a/b", "a/b/README.md"),
    ],
)
def test_an_address_is_written_as_it_is_read(address: HubAddress, text: str, file: str) -> None:
    assert str(address) == text
    assert parse_address(text) == address
    assert address.within("README.md") == file


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("owner/name", True),
        ("owner/name@v1/ep2", True),
        ("name", False),
        ("./owner/name", False),
        ("-o/name", False),
        ("/owner/name", False),
        ("owner/name with space", False),
    ],
)
def test_a_name_looks_like_a_hub_id(text: str, answer: bool) -> None:
    assert looks_like_hub_id(text) is answer


@pytest.mark.parametrize(
    ("place", "name"),
    [("hf://o/mine-ep2@v1", "mine-ep2"), ("s3://bucket/a/b/", "b"), ("hf://o/n@v1/ep2", "ep2")],
)
def test_a_copy_is_called_after_the_last_part(place: str, name: str) -> None:
    assert last_name(place) == name


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    # Which library the response is of has changed between releases of huggingface_hub.
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("The Hub says no.\nSecond line.", response=response)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answered(RepositoryNotFoundError, 401), "Is the name right?"),
        (answered(GatedRepoError, 403), "Request access on its page"),
        (answered(RevisionNotFoundError, 404), "a branch, a tag or a commit"),
        (answered(HfHubHTTPError, 401), "HF_TOKEN"),
        (answered(HfHubHTTPError, 403), "to a token that allows this"),
        (answered(HfHubHTTPError, 412), "run it again"),
        (answered(HfHubHTTPError, 503), "is the server reachable?"),
        (LocalEntryNotFoundError("not in the cache"), "HF_HUB_OFFLINE is set"),
        (PermissionError(errno.EACCES, "Forbidden"), "Are the credentials right"),
        (ConnectionResetError("reset"), "is the server reachable?"),
    ],
)
def test_an_error_says_where_what_and_what_to_do(error: Exception, said: str) -> None:
    told = access_error("hf://owner/name", error)
    assert told.message.startswith(f"hf://owner/name: {type(error).__name__}")
    assert "\n" not in told.message
    assert said in (told.hint or "")


def test_a_driver_that_has_no_credentials_is_known_by_its_errors_name() -> None:
    class NoCredentialsError(Exception):
        """As botocore names it."""

    assert "AWS_ACCESS_KEY_ID" in str(access_error("s3://bucket", NoCredentialsError()))


def test_errors_of_ours_pass_and_others_are_translated_with_their_cause() -> None:
    ours = LayoutError("mine.")
    with pytest.raises(LayoutError) as passed, translating_errors("s3://bucket"):
        raise ours
    assert passed.value is ours
    with pytest.raises(AdapterError) as translated, translating_errors("s3://bucket"):
        raise TimeoutError("too slow")
    assert isinstance(translated.value.__cause__, TimeoutError)
