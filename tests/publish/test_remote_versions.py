"""Versions uploaded to a URL and to the Hub: what is there, what goes, what is never replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorashard import Publisher, pull_shards, push_shards
from lorashard.errors import AdapterError, ManifestError, OutputExistsError
from tests.hub_server import HubServer
from tests.lora_endpoints import Endpoints
from tests.object_storage import ObjectStorage
from tests.publish.test_publisher import names, publish_all, write
from tests.tiny import RANK_FILES, REPO, contents, run_cli


def publisher_of(tmp_path: Path, upload_to: str, **options: Any) -> Publisher:
    return Publisher(tmp_path / "versions", "policy", upload_to=upload_to, **options)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def publisher(tmp_path: Path, bucket: Path) -> Publisher:
    return publisher_of(tmp_path, f"file://{bucket}")


def test_a_url_gets_a_folder_for_each_version_and_keeps_the_last_k(
    tmp_path: Path, publisher: Publisher, bucket: Path
) -> None:
    for version in range(4):
        write(publisher, version)
        published = publisher.publish(version)
        assert published.uploaded_to == f"file://{bucket}/policy-v{version:05}"
        assert published.removal.left == ()
    assert sorted(os.listdir(bucket)) == names(2, 3)
    pull_shards(f"file://{bucket}/policy-v00003", tmp_path / "pulled", range(2))
    assert contents(tmp_path / "pulled") == contents(publisher.path(3))


def test_object_storage_has_the_last_k_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectStorage() as storage:
        for name, value in storage.environment().items():
            monkeypatch.setenv(name, value)
        publisher = publisher_of(tmp_path, storage.url("policies"), keep=1)
        publish_all(publisher, 1, 2)
        pull_shards(storage.url("policies/policy-v00002"), tmp_path / "pulled", range(2))
        with pytest.raises(ManifestError, match="no such file"):
            pull_shards(storage.url("policies/policy-v00001"), tmp_path / "old", range(2))
        removed = [line for line in storage.lines() if line.startswith("DELETE")]
        assert "policy-v00001/lorashard.json" in removed[0]
        assert len(removed) == len(contents(publisher.path(2))) + 1  # the model card
    assert contents(tmp_path / "pulled") == contents(publisher.path(2))


def test_a_version_that_is_there_is_not_uploaded_again(publisher: Publisher, bucket: Path) -> None:
    publish_all(publisher, 1)
    before = {path: path.stat().st_mtime_ns for path in bucket.rglob("*")}
    publisher.publish(1)
    assert {path: path.stat().st_mtime_ns for path in bucket.rglob("*")} == before


def test_an_upload_that_was_killed_is_finished(publisher: Publisher, bucket: Path) -> None:
    publish_all(publisher, 1)
    before = contents(bucket)
    (bucket / "policy-v00001" / "lorashard.json").unlink()
    (bucket / "policy-v00001" / RANK_FILES[1]).write_bytes(b"half")
    publisher.publish(1)
    assert contents(bucket) == before


def test_another_version_of_the_same_name_is_never_replaced(
    tmp_path: Path, publisher: Publisher, bucket: Path
) -> None:
    write(publisher, 1, 2)
    push_shards(publisher.path(2), f"file://{bucket}/policy-v00001")
    before = contents(bucket)
    with pytest.raises(OutputExistsError, match="holds another version under this name"):
        publisher.publish(1)
    assert contents(bucket) == before


@pytest.mark.parametrize("foreign", ["more", "folder", "card", "adapter"])
def test_what_is_not_ours_is_never_removed(
    tmp_path: Path, publisher: Publisher, bucket: Path, foreign: str
) -> None:
    publish_all(publisher, 1)
    folder = bucket / "policy-v00001"
    if foreign == "more":
        (folder / "notes.txt").write_text("mine")
    elif foreign == "folder":
        (folder / "runs").mkdir()
    elif foreign == "card":
        (folder / "README.md").write_text("mine")
    else:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "adapter-1", folder)
    before = contents(folder)
    write(publisher, 2, 3)
    publisher.publish(2)
    assert publisher.publish(3).removal.left == (
        f"file://{folder}: holds something else than shards",
    )
    assert contents(folder) == before


def test_a_removal_that_was_killed_is_finished(publisher: Publisher, bucket: Path) -> None:
    publish_all(publisher, 1)
    (bucket / "policy-v00001" / "lorashard.json").unlink()
    (bucket / "policy-v1").mkdir()
    publish_all(publisher, 2, 3)
    assert sorted(os.listdir(bucket)) == sorted([*names(2, 3), "policy-v1"])


def test_servers_have_a_version_whose_upload_fails(tmp_path: Path, bucket: Path) -> None:
    bucket.write_text("a file is in the way")
    with Endpoints().running() as server:
        publisher = publisher_of(tmp_path, f"file://{bucket}", servers=[server.url])
        write(publisher, 1)
        with pytest.raises(AdapterError, match=f"{bucket}/policy-v00001"):
            publisher.publish(1)
        bucket.unlink()
        publisher.publish(1)
        assert server.events == ["loaded policy-v00001"]
    assert os.listdir(bucket) == names(1)


def test_a_place_that_is_no_url_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither hf://owner/name nor another URL"):
        publisher_of(tmp_path, str(tmp_path / "bucket"))


_PUBLISH = """
import json, sys
from lorashard import LorashardError, Publisher
publisher = Publisher(sys.argv[1], "policy", upload_to=sys.argv[2], private=True)
try:
    for version in sys.argv[3:]:
        print(json.dumps(publisher.publish(int(version)).uploaded_to))
except LorashardError as err:
    sys.exit(str(err))
"""


def publish_to_hub(hub: HubServer, home: Path, publisher: Publisher, target: str, *versions: int):
    """In a process of its own: huggingface_hub reads its environment as it is imported."""
    directory = publisher.path(0).parent
    return subprocess.run(
        [sys.executable, "-c", _PUBLISH, directory, target, *map(str, versions)],
        env=hub.environment(home, hub.token) | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["", "/ep2"])
def test_the_hub_has_a_commit_with_a_tag_for_each_version(tmp_path: Path, folder: str) -> None:
    publisher = Publisher(tmp_path / "versions", "policy")
    write(publisher, 1, 2, 3)
    before = contents(publisher.path(2).parent)
    with HubServer() as hub:
        target = f"hf://owner/mine{folder}"
        done = publish_to_hub(hub, tmp_path / "hf", publisher, target, 1, 2, 3)
        assert done.returncode == 0, done.stderr
        places = [json.loads(line) for line in done.stdout.splitlines()]
        assert places == [f"hf://owner/mine@{name}{folder}" for name in names(1, 2, 3)]
        repo = hub.repos["owner/mine"]
        assert repo.private
        assert sorted(repo.tags) == names(1, 2, 3)
        assert len(set(repo.tags.values())) == 3
        assert repo.tags["policy-v00003"] == hub.head("owner/mine")
        for place, version in zip(places, (1, 2)):
            env, out = hub.environment(tmp_path / "pod", hub.token), tmp_path / f"pulled-{version}"
            pulled = run_cli("pull", place, "--node-ranks", "0-1", "-o", out, **env)
            assert pulled.returncode == 0, pulled.stderr
            assert contents(out) == {
                name.partition("/")[2]: data
                for name, data in before.items()
                if name.startswith(f"policy-v0000{version}/")
            }


def test_a_version_that_is_on_the_hub_is_neither_uploaded_again_nor_replaced(
    tmp_path: Path,
) -> None:
    publisher = Publisher(tmp_path / "versions", "policy")
    write(publisher, 1)
    with HubServer() as hub:
        for _ in range(2):
            done = publish_to_hub(hub, tmp_path / "hf", publisher, "owner/mine", 1)
            assert done.returncode == 0, done.stderr
            commits = len(hub.repos["owner/mine"].commits)
            assert commits == 2  # that of a new repository, and the upload
        shutil.rmtree(publisher.path(1))
        write(publisher, 2)
        publisher.path(2).rename(publisher.path(1))
        done = publish_to_hub(hub, tmp_path / "hf", publisher, "owner/mine", 1)
        assert "holds another version under this name" in done.stderr
        assert len(hub.repos["owner/mine"].commits) == commits
