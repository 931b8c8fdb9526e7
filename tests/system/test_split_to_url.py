"""`split -o URL`: what is there afterwards, what is refused first, and what is left on this disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.object_storage import ObjectStorage
from tests.tiny import (
    RANK_FILES,
    REPO,
    contents,
    mounted_tmpfs,
    per_expert_tensors,
    run_cli,
    save_adapter,
)

ADAPTER, PLACE = ObjectStorage.url("adapter"), ObjectStorage.url("published/mine-ep2")
WEIGHTS = "adapter_model.safetensors"
MINE = "owner/mine-ep2"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStorage]:
    with ObjectStorage() as storage:
        yield storage


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("local") / "adapter", per_expert_tensors(hidden=64))


@pytest.fixture(scope="module")
def local_shards(adapter: Path) -> Path:
    out = adapter.with_name("shards")
    assert run_cli("split", adapter, "--ep-size", 2, "-o", out).returncode == 0
    return out


@pytest.fixture
def storage(server: ObjectStorage, adapter: Path) -> ObjectStorage:
    server.hold_only("adapter", adapter)
    return server


@pytest.fixture
def hub(adapter: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("owner/source", {path.name: path for path in adapter.iterdir()})
        yield server


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """TMPDIR of the command, in which nothing is left, whatever happens."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def split(storage: ObjectStorage, temporary: Path, *options: object, to: str = PLACE) -> Any:
    env = storage.environment(TMPDIR=str(temporary))
    return run_cli("split", ADAPTER, "--ep-size", 2, "-o", to, *options, **env)


def split_on_hub(
    hub: HubServer, temporary: Path, to: str, *options: object, token: str | None = HubServer.token
) -> Any:
    env = hub.environment(temporary.with_name("hf"), token) | {"TMPDIR": str(temporary)}
    return run_cli("split", "hf://owner/source", "--ep-size", 2, "-o", to, *options, **env)


def puts(storage: ObjectStorage) -> list[str]:
    return [r.path.rpartition("/")[2] for r in storage.requests if r.method == "PUT"]


def test_what_is_in_the_bucket_is_what_split_and_push_leave_there(
    tmp_path: Path, storage: ObjectStorage, temporary: Path, local_shards: Path
) -> None:
    done = split(storage, temporary)
    assert (done.returncode, done.stdout) == (0, f"{PLACE}\n"), done.stderr
    assert puts(storage)[-1] == "lorashard.json"
    pulled, env = tmp_path / "pulled", storage.environment()
    done = run_cli("pull", PLACE, "--node-ranks", "0-1", "-o", pulled, **env)
    assert done.returncode == 0, done.stderr
    assert contents(pulled) == contents(local_shards)


def test_shards_that_are_there_are_replaced_with_force_alone(
    storage: ObjectStorage, temporary: Path
) -> None:
    assert split(storage, temporary).returncode == 0
    storage.requests.clear()
    refused = split(storage, temporary)
    assert refused.returncode == 5
    assert f"error: {PLACE}: exists.\n  --force replaces it." in refused.stderr
    assert storage.sent_bytes(f"/adapter/{WEIGHTS}") == 0, "refused before the adapter is read"
    assert puts(storage) == []
    dry = split(storage, temporary, "--ep-size", 4, "--force", "--dry-run", "--json")
    assert puts(storage) == []
    wet = split(storage, temporary, "--ep-size", 4, "--force", "--json")
    assert wet.returncode == 0, wet.stderr
    assert f"note: would be removed there: {', '.join(RANK_FILES)}\n" in dry.stderr
    document = json.loads(wet.stdout)
    assert json.loads(dry.stdout) == document | {"dry_run": True}
    assert (document["out"], document["ep_size"]) == (PLACE, 4)
    assert document["pushed"] == {
        "place": PLACE, "revision": None, "removed": list(RANK_FILES), "kept_card": False,
    }  # fmt: skip
    assert run_cli("verify", PLACE, **storage.environment()).returncode == 0


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("s3://nowhere/mine", "error: s3://nowhere/mine: there is no bucket nowhere.\n"),
        (ADAPTER, f"error: {ADAPTER}: already holds an adapter"),
        ("gs://bucket/mine", "error: gcsfs is not installed, and gs://bucket/mine needs it.\n"),
        ("nosuch://bucket/mine", "error: nosuch://bucket/mine: "),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_adapter_is_read(
    storage: ObjectStorage, temporary: Path, to: str, said: str
) -> None:
    done = split(storage, temporary, to=to)
    assert done.returncode in (3, 5)
    assert said in done.stderr
    assert storage.sent_bytes(f"/adapter/{WEIGHTS}") == 0
    assert puts(storage) == []


def test_an_upload_that_breaks_leaves_nothing_that_is_taken_for_whole(
    storage: ObjectStorage, temporary: Path
) -> None:
    storage.fail(RANK_FILES[1], 403, times=None, method="PUT")
    done = split(storage, temporary)
    assert done.returncode == 3, done.stdout
    assert RANK_FILES[0] in puts(storage)
    assert run_cli("verify", PLACE, **storage.environment()).returncode != 0
    storage.mend()
    assert split(storage, temporary).returncode == 0
    assert run_cli("verify", PLACE, **storage.environment()).returncode == 0


@pytest.mark.parametrize(
    ("signum", "how", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGHUP, "stopped by SIGHUP", 129),
    ],
)
def test_a_signal_during_the_upload_leaves_no_copy_here(
    storage: ObjectStorage, temporary: Path, signum: int, how: str, code: int
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO), **storage.environment(TMPDIR=str(temporary))}
    held: list[str] = []

    def stop() -> None:
        held.extend(path.name for path in temporary.glob("*/output/*"))
        process.send_signal(signum)

    storage.when(RANK_FILES[1], stop, method="PUT")
    command = ["split", ADAPTER, "--ep-size", "2", "-o", PLACE]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorashard", *command], env=env, stderr=subprocess.PIPE, text=True
    )
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert set(RANK_FILES) < set(held)
    said = (
        f"{how}; {PLACE} is incomplete if it has no lorashard.json. Run the same command again.\n"
    )
    assert stderr.endswith(said)
    assert "lorashard.json" not in puts(storage)


def test_a_temporary_folder_without_room_is_told_with_figures(tmp_path: Path) -> None:
    large = save_adapter(tmp_path / "large", per_expert_tensors(hidden=8192))
    with mounted_tmpfs(tmp_path / "disk", "size=64k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        place = (tmp_path / "there").as_uri()
        env = {"TMPDIR": str(tmp_path / "disk")}
        done = run_cli("split", large, "--ep-size", 2, "-o", place, "-q", **env)
        assert os.listdir(tmp_path / "disk") == []
    assert done.returncode == 5
    assert re.search(r"\d\.\d\d MB are to be written, and \S+ has 0\.0\d MB free\.\n", done.stderr)
    assert "TMPDIR" in done.stderr
    assert not (tmp_path / "there").exists()


def test_on_the_hub_it_is_one_commit_and_a_dry_run_none(
    tmp_path: Path, hub: HubServer, temporary: Path, local_shards: Path
) -> None:
    dry = split_on_hub(hub, temporary, f"hf://{MINE}", "--dry-run", "--private")
    assert dry.returncode == 0, dry.stderr
    assert MINE not in hub.repos
    done = split_on_hub(hub, temporary, f"hf://{MINE}", "--private", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["out"] == document["pushed"]["place"] == f"hf://{MINE}"
    assert document["pushed"]["revision"] == hub.head(MINE)
    assert hub.repos[MINE].private
    for name in RANK_FILES:
        assert hub.read(MINE, name) == (local_shards / name).read_bytes()
    assert f"`owner/source` at `{hub.head('owner/source')}`" in hub.read(MINE, "README.md").decode()


@pytest.mark.parametrize(
    ("token", "dry_run"),
    [(None, ()), (HubServer.read_token, ("--dry-run",)), ("hf_" + "x" * 34, ())],
)
def test_without_a_token_that_may_write_nothing_is_split(
    hub: HubServer, temporary: Path, token: str | None, dry_run: tuple[str, ...]
) -> None:
    done = split_on_hub(hub, temporary, f"hf://{MINE}", *dry_run, token=token)
    assert done.returncode == 3, done.stdout
    assert "HF_TOKEN" in done.stderr
    assert hub.ranges(WEIGHTS) == []
    assert MINE not in hub.repos


def test_a_repository_with_an_adapter_in_it_is_left_alone(hub: HubServer, temporary: Path) -> None:
    done = split_on_hub(hub, temporary, "hf://owner/source")
    assert done.returncode == 5
    assert "hf://owner/source/ep2" in done.stderr
    assert len(hub.repos["owner/source"].commits) == 1


def test_a_local_directory_is_not_private() -> None:
    done = run_cli("split", "A", "--private", "-o", "x", "--ep-size", 2)
    assert done.returncode == 5
    assert "--private is for -o hf://owner/name" in done.stderr


def test_a_mistyped_number_of_ranks_does_not_fill_the_memory(adapter: Path, tmp_path: Path) -> None:
    place = (tmp_path / "there").as_uri()
    done = run_cli("split", adapter, "--ep-size", 10**12, "-o", place)
    assert done.returncode == 4
    assert "it can be 65536 at most" in done.stderr
