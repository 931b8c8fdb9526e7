"""The server that stands in for the Hub, asked by the real huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import HubServer, Request

REPO = "owner/model"
SMALL, LARGE = b'{"a": 1}', bytes(range(256)) * 1000
FILES = {"config.json": SMALL, "sub/model.safetensors": LARGE}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # What HubServer.environment sets for a subprocess; here the library has read it already.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HubServer() as server:
        server.add_repo(REPO, FILES)
        yield server


def client(hub: HubServer, token: str | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token or False)


def download(api: HfApi, repo: str, folder: Path, **more: Any) -> dict[str, bytes]:
    copy = Path(api.snapshot_download(repo, cache_dir=folder, **more))
    return {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def read(hub: HubServer, begin: int, end: int) -> bytes:
    fs = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    name, exact = f"{REPO}/sub/model.safetensors", {"cache_type": "none", "size": len(LARGE)}
    content: bytes = fs.cat_file(name, start=begin, end=end, **exact)
    return content


def uploads(hub: HubServer) -> list[Request]:
    return [request for request in hub.requests if request.method == "PUT"]


# Reading


def test_a_snapshot_is_what_was_committed(hub: HubServer, tmp_path: Path) -> None:
    assert download(client(hub), REPO, tmp_path) == FILES
    assert hub.sent_bytes("config.json") == len(SMALL)
    assert hub.sent_bytes("model.safetensors") == len(LARGE)


def test_a_small_file_comes_from_the_hub_and_a_large_one_from_the_cdn_without_a_token(
    hub: HubServer, tmp_path: Path
) -> None:
    download(client(hub, hub.token), REPO, tmp_path)
    sent = [request for request in hub.requests if request.ranged]
    assert {(r.server, r.path.rpartition("/")[2], r.token) for r in sent} == {
        ("hub", "config.json", hub.token),
        ("cdn", "model.safetensors", None),
    }


def test_revisions_are_branches_tags_and_commits(hub: HubServer, tmp_path: Path) -> None:
    first = hub.head(REPO)
    hub.tag(REPO, "v1", first)
    second = hub.commit(REPO, {"config.json": b"[]", "sub/model.safetensors": None})
    hub.commit(REPO, {"config.json": b"[1]"}, branch="other")
    api = client(hub)
    for revision, files in {
        "v1": FILES, first: FILES, "main": {"config.json": b"[]"}, second: {"config.json": b"[]"},
        "other": {"config.json": b"[1]"},
    }.items():  # fmt: skip
        assert download(api, REPO, tmp_path, revision=revision) == files
    assert api.model_info(REPO, revision="v1").sha == first
    assert [ref.name for ref in api.list_repo_refs(REPO).branches] == ["main", "other"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="gone")


def test_of_a_file_the_bytes_that_are_asked_for_are_sent(hub: HubServer) -> None:
    assert read(hub, 10, 3000) == LARGE[10:3000]
    assert hub.ranges("model.safetensors") == [(10, 3000)]
    assert hub.sent_bytes("model.safetensors") == 2990


def test_what_is_private_is_not_there_for_others(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/private", FILES, private=True)
    for token in (None, hub.stranger_token):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info("owner/private")
        assert not client(hub, token).repo_exists("owner/private")
    for token in (hub.token, hub.read_token):
        assert download(client(hub, token), "owner/private", tmp_path / token) == FILES


def test_a_token_that_is_wrong_reads_nothing(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        client(hub, "hf_wrong").model_info(REPO)
    assert refused.value.response.status_code == 401


def test_what_is_gated_shows_its_names_but_not_its_content(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("owner/gated", FILES, gated=True)
    assert client(hub).list_repo_files("owner/gated") == sorted(FILES)
    for token in (None, hub.stranger_token):
        with pytest.raises(GatedRepoError):
            client(hub, token).hf_hub_download("owner/gated", "config.json", cache_dir=tmp_path)
    assert download(client(hub, hub.token), "owner/gated", tmp_path) == FILES


def test_long_listings_come_in_pages(hub: HubServer) -> None:
    hub.page_size = 4
    hub.add_repo("owner/many", {f"folder/{n}.txt": b"" for n in range(10)})
    assert client(hub).list_repo_files("owner/many") == [f"folder/{n}.txt" for n in range(10)]
    assert sum("/tree/" in line for line in hub.lines()) == 3


# Faults


def test_a_connection_is_cut_where_that_was_asked_for(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after("model.safetensors", 70_000)
    assert download(client(hub), REPO, tmp_path) == FILES
    sent = [r.sent_bytes for r in hub.requests if r.ranged and "model.safetensors" in r.path]
    assert (len(sent), sent[0]) == (2, 70_000)


def test_a_server_out_of_order_is_asked_again(hub: HubServer) -> None:
    hub.fail("model.safetensors", status=503, method="GET")
    assert read(hub, 10, 3000) == LARGE[10:3000]
    assert sum(request.status == 503 for request in hub.requests) == 1


def test_a_file_that_is_lost_is_listed_and_not_found(hub: HubServer, tmp_path: Path) -> None:
    hub.drop("model.safetensors")
    assert client(hub).list_repo_files(REPO) == sorted(FILES)
    with pytest.raises(EntryNotFoundError):
        client(hub).hf_hub_download(REPO, "sub/model.safetensors", cache_dir=tmp_path)


def test_a_damaged_byte_is_the_only_one_that_differs(hub: HubServer, tmp_path: Path) -> None:
    hub.corrupt("model.safetensors", 1234)
    got = download(client(hub), REPO, tmp_path)["sub/model.safetensors"]
    assert [at for at, (a, b) in enumerate(zip(got, LARGE)) if a != b] == [1234]


# Writing


def test_a_new_repository_is_private_where_that_is_asked_for(hub: HubServer) -> None:
    api = client(hub, hub.token)
    for _ in range(2):
        api.create_repo("owner/new", private=True, exist_ok=True)
    assert api.model_info("owner/new").private
    assert not client(hub).repo_exists("owner/new")
    assert api.file_exists("owner/new", ".gitattributes")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("owner/new")
    assert refused.value.response.status_code == 409


def test_a_folder_is_uploaded_and_comes_back(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub, hub.token)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    api.create_repo("owner/new")
    api.upload_folder(repo_id="owner/new", folder_path=folder)
    assert api.list_repo_files("owner/new") == [".gitattributes", *sorted(FILES)]
    copy = download(api, "owner/new", tmp_path / "cache")
    assert {name: copy[name] for name in FILES} == FILES
    # A small file is in the commit, a large one is put into storage.
    assert len(uploads(hub)) == 1


def test_a_commit_adds_and_deletes_together(hub: HubServer) -> None:
    made = client(hub, hub.token).create_commit(
        REPO,
        [
            CommitOperationAdd("new.json", b"{}"),
            CommitOperationAdd("new.safetensors", LARGE[::-1]),
            CommitOperationDelete("config.json"),
            CommitOperationDelete("sub/"),
        ],
        commit_message="another",
    )
    assert made.oid == hub.head(REPO)
    assert hub.files(REPO) == ["new.json", "new.safetensors"]
    assert hub.read(REPO, "new.safetensors") == LARGE[::-1]


def test_content_that_is_there_already_is_not_sent_again(hub: HubServer) -> None:
    add = CommitOperationAdd("copy.safetensors", LARGE)
    client(hub, hub.token).create_commit(REPO, [add], commit_message="a copy")
    assert uploads(hub) == []
    assert hub.read(REPO, "copy.safetensors") == LARGE


def test_an_upload_that_fails_is_tried_again(hub: HubServer) -> None:
    hub.fail("/upload/", status=503)
    add = CommitOperationAdd("new.safetensors", LARGE * 20)
    client(hub, hub.token).create_commit(REPO, [add], commit_message="more")
    assert [request.status for request in uploads(hub)] == [503, 200]


@pytest.mark.parametrize(
    ("who", "status"), [("read_token", 403), ("stranger_token", 403), (None, 401)]
)
def test_who_may_not_write_does_not(hub: HubServer, who: str | None, status: int) -> None:
    api, before = client(hub, getattr(hub, who) if who else None), hub.head(REPO)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(REPO, [CommitOperationAdd("a", b"")], commit_message="mine")
    assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("owner/new")
    assert refused.value.response.status_code == status
    assert (hub.head(REPO), "owner/new" in hub.repos) == (before, False)


def test_a_commit_on_what_has_moved_meanwhile_is_refused(hub: HubServer) -> None:
    first = hub.head(REPO)
    hub.commit(REPO, {"config.json": b"[]"})
    add = CommitOperationAdd("config.json", b"[2]")
    with pytest.raises(HfHubHTTPError) as refused:
        client(hub, hub.token).create_commit(
            REPO, [add], commit_message="late", parent_commit=first
        )
    assert refused.value.response.status_code == 412
    assert hub.read(REPO, "config.json") == b"[]"
