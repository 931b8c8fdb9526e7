"""`merge`, `convert`, `reshard` and a batch of `split` with `-o URL`: what is there, and what never is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, reshard_shards, split_adapter
from lorashard.errors import OutputExistsError
from lorashard.to_url import UrlOutput, split_to_url
from lorashard.uploading.card import is_untouched
from lorashard.uploading.contents import ShardsContent
from tests.hub_server import HubServer
from tests.object_storage import ObjectStorage
from tests.tiny import REPO, contents, per_expert_tensors, run_cli, save_adapter, save_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARDS, PLACE = ObjectStorage.url("shards"), ObjectStorage.url("published/mine")


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStorage]:
    with ObjectStorage() as storage:
        yield storage


@pytest.fixture
def storage(server: ObjectStorage, shards: Path) -> ObjectStorage:
    server.hold_only("shards", shards)
    return server


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("local") / "adapter")


@pytest.fixture(scope="module")
def shards(adapter: Path) -> Path:
    split_adapter(adapter, adapter.with_name("shards"), 2)
    return adapter.with_name("shards")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two adapters, and one without weights."""
    for number in range(2):
        save_adapter(tmp_path / "runs" / f"step-{number}", per_expert_tensors(seed=number))
    save_config(tmp_path / "runs" / "step-broken")
    return tmp_path / "runs"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """TMPDIR of the command, in which nothing is left, whatever happens."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def run(server: ObjectStorage, temporary: Path, *words: object) -> Any:
    return run_cli(*words, **server.environment(TMPDIR=str(temporary)))


def on_hub(hub: HubServer, temporary: Path, *words: object) -> Any:
    env = hub.environment(temporary.with_name("hf"), hub.token) | {"TMPDIR": str(temporary)}
    return run_cli(*words, **env)


def puts(storage: ObjectStorage) -> list[str]:
    return [r.path.rpartition("/")[2] for r in storage.requests if r.method == "PUT"]


def test_a_merged_adapter_goes_to_a_bucket_with_its_config_last(
    tmp_path: Path, storage: ObjectStorage, temporary: Path, adapter: Path
) -> None:
    done = run(storage, temporary, "merge", SHARDS, "-o", PLACE, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["out"] == document["pushed"]["place"] == PLACE
    assert puts(storage) == [WEIGHTS, "README.md", CONFIG]
    storage.requests.clear()
    refused = run(storage, temporary, "merge", SHARDS, "-o", PLACE)
    assert refused.returncode == 5
    assert f"error: {PLACE}: exists.\n  --force replaces it." in refused.stderr
    assert not [line for line in storage.lines() if "/shards/" in line], "before anything is read"
    storage.requests.clear()
    assert run(storage, temporary, "merge", SHARDS, "-o", PLACE, "--force").returncode == 0
    changes = [r.line for r in storage.requests if r.method in ("PUT", "DELETE")]
    assert changes[0].startswith(f"DELETE /bucket/published/mine/{CONFIG} ")
    there = {name: storage.get(f"published/mine/{name}") for name in (CONFIG, WEIGHTS)}
    assert there == contents(adapter)


def test_an_upload_of_an_adapter_that_breaks_leaves_none(
    storage: ObjectStorage, temporary: Path
) -> None:
    for name in (CONFIG, WEIGHTS):
        storage.put(f"published/mine/{name}", b"older")
    storage.fail(WEIGHTS, 403, times=None, method="PUT")
    done = run(
        storage, temporary, "convert", SHARDS, "--layout", "per_expert", "-o", PLACE, "--force"
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert storage.keys("published/mine/") == [f"published/mine/{WEIGHTS}"]


def test_a_signal_during_the_upload_of_an_adapter_leaves_no_copy_here(
    storage: ObjectStorage, temporary: Path
) -> None:
    held: list[str] = []

    def stop() -> None:
        held.extend(path.name for path in temporary.glob("*/output/*"))
        process.send_signal(signal.SIGTERM)

    storage.when(f"mine/{WEIGHTS}", stop, method="PUT")
    env = {**os.environ, "PYTHONPATH": str(REPO), **storage.environment(TMPDIR=str(temporary))}
    command = [sys.executable, "-m", "lorashard", "merge", SHARDS, "-o", PLACE]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert WEIGHTS in held
    assert stderr.endswith(
        f"stopped by SIGTERM; {PLACE} is incomplete if it has no {CONFIG}. "
        "Run the same command again with --force.\n"
    )
    assert CONFIG not in puts(storage)


def test_resharded_shards_go_where_push_would_put_them(
    tmp_path: Path, shards: Path, temporary: Path
) -> None:
    there = tmp_path / "there"
    reshard = ("reshard", shards, "--ep-size", 3, "-o", there.as_uri(), "--json")
    dry = run_cli(*reshard, "--dry-run", TMPDIR=str(temporary))
    assert dry.returncode == 0, dry.stderr
    assert not there.exists()
    wet = run_cli(*reshard, TMPDIR=str(temporary))
    assert json.loads(wet.stdout) | {"dry_run": True} == json.loads(dry.stdout)
    reshard_shards(shards, tmp_path / "local", 3)
    found = contents(there)
    assert is_untouched(found.pop("README.md").decode())
    assert found == contents(tmp_path / "local")


def test_a_converted_adapter_on_the_hub_is_one_commit_beside_somebodys_card(
    hub: HubServer, temporary: Path, shards: Path
) -> None:
    mine = "owner/plain"
    convert = ("convert", shards, "--layout", "per_expert", "-o", f"hf://{mine}", "--private")
    done = on_hub(hub, temporary, *convert, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["revision"] == hub.head(mine)
    assert hub.repos[mine].private
    assert "library_name: peft\n" in hub.read(mine, "README.md").decode()
    hub.commit(mine, {"README.md": b"# Mine\n", CONFIG: b"{}"})
    before = hub.head(mine)
    refused = on_hub(hub, temporary, *convert)
    assert refused.returncode == 5
    assert "--force replaces it with a new commit" in refused.stderr
    assert hub.head(mine) == before
    forced = on_hub(hub, temporary, *convert, "--force")
    assert forced.returncode == 0, forced.stderr
    assert hub.read(mine, "README.md") == b"# Mine\n"
    assert len(hub.repos[mine].commits) == 4  # that of the repository, and three


def test_each_adapter_of_a_batch_is_uploaded_or_its_failure_is_told(
    storage: ObjectStorage, temporary: Path, runs: Path
) -> None:
    batch = ("split", runs / "*", "--ep-size", 2, "-o", ObjectStorage.url("all/"), "--json")
    storage.fail("step-1-ep2/lorashard.json", 403, times=None, method="PUT")
    first = run(storage, temporary, *batch)
    assert first.returncode == 3
    assert "1 split, 0 already there, 2 failed" in first.stderr
    documents = {Path(item["adapter"]).name: item for item in json.loads(first.stdout)}
    assert documents["step-0"]["pushed"]["place"] == ObjectStorage.url("all/step-0-ep2")
    assert documents["step-1"]["kind"] == "AdapterError"
    storage.mend()
    storage.requests.clear()
    again = run(storage, temporary, *batch, "--resume")
    statuses = [item["status"] for item in json.loads(again.stdout)]
    assert statuses == ["skipped", "done", "failed"]
    assert not [r for r in storage.requests if r.method == "PUT" and "step-0" in r.path]
    for number in range(2):
        place = ObjectStorage.url(f"all/step-{number}-ep2")
        verified = run(storage, temporary, "verify", place, "--against", runs / f"step-{number}")
        assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize("change", ["values", "shards", "placement"])
def test_resume_does_not_take_other_shards_that_are_there_for_these(
    tmp_path: Path, change: str
) -> None:
    adapter, there = save_adapter(tmp_path / "adapter"), tmp_path / "there"
    output, request = UrlOutput(there.as_uri(), ShardsContent(2)), SplitRequest(2)
    assert split_to_url(str(adapter), output, request, resume=True).status == "done"
    assert split_to_url(str(adapter), output, request, resume=True).status == "skipped"
    if change == "values":  # the same names, shapes and sizes
        save_adapter(adapter, per_expert_tensors(seed=7))
    elif change == "shards":
        path = there / "replicated.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        request = SplitRequest(2, strategy="round_robin")
    before = contents(there)
    with pytest.raises(OutputExistsError):
        split_to_url(str(adapter), output, request, resume=True)
    assert contents(there) == before
    forced = replace(output, force=True)
    assert split_to_url(str(adapter), forced, request, resume=True).status == "done"
    assert contents(there) != before


def test_a_part_of_a_batch_goes_up_and_a_place_that_cannot_be_is_refused_at_once(
    storage: ObjectStorage, temporary: Path, runs: Path
) -> None:
    named = ("split", runs / "step-0", runs / "step-1", "--ep-size", 2)
    done = run(storage, temporary, *named, "--part", "1/2", "-o", PLACE)
    assert (done.returncode, done.stdout) == (0, f"{PLACE}/step-1-ep2\n"), done.stderr
    storage.requests.clear()
    refused = run(storage, temporary, *named, "-o", "s3://nowhere/all")
    assert refused.returncode == 3
    assert refused.stderr.startswith("error: s3://nowhere/all: there is no bucket nowhere.\n")
    assert len(storage.requests) == 1


def test_machines_that_fill_one_repository_do_not_stop_each_other(
    hub: HubServer, temporary: Path, runs: Path
) -> None:
    (runs / "step-broken" / CONFIG).unlink()
    hub.add_repo("owner/all", {"step-9-ep2/lorashard.json": b"{}"})
    others = iter(range(10))
    for _ in range(2):
        hub.when("/commit/", lambda: hub.commit("owner/all", {f"x/{next(others)}": b"theirs"}))
    batch = ("split", runs / "*", "--ep-size", 2, "-o", "hf://owner/all")
    done = on_hub(hub, temporary, *batch, "--json")
    assert done.returncode == 0, done.stderr
    assert next(others) == 2
    for item in json.loads(done.stdout):
        revision = item["pushed"]["revision"]
        assert f"{Path(item['adapter']).name}-ep2/lorashard.json" in hub.files(
            "owner/all", revision
        )
    again = on_hub(hub, temporary, *batch, "--resume", "--json")
    assert [item["status"] for item in json.loads(again.stdout)] == ["skipped", "skipped"]
