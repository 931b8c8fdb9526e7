"""Adapters and shards in S3, read by the command line through the real s3fs."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorashard.storage.remote import RemoteFolder, locate
from tests.object_storage import ObjectStorage
from tests.tiny import RANK_FILES, contents, per_expert_tensors, run_cli, save_adapter

WEIGHTS = "adapter_model.safetensors"
ADAPTER = ObjectStorage.url("adapter")
SHARDS = ObjectStorage.url("shards")
WINDOW_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStorage]:
    with ObjectStorage() as storage:
        yield storage


@pytest.fixture
def storage(server: ObjectStorage, adapter: Path) -> ObjectStorage:
    server.hold_only("adapter", adapter)
    return server


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = per_expert_tensors(hidden=512, layers=3)
    return save_adapter(tmp_path_factory.mktemp("local") / "adapter", tensors)


@pytest.fixture(scope="module")
def local_shards(adapter: Path) -> Path:
    return split_locally(adapter, adapter.with_name("shards"))


@pytest.fixture
def shards(storage: ObjectStorage, local_shards: Path) -> Path:
    storage.put_folder("shards", local_shards)
    return local_shards


def split_locally(adapter: Path, out: Path) -> Path:
    done = run_cli("split", adapter, "--ep-size", 2, "-o", out)
    assert done.returncode == 0, done.stderr
    return out


def large_adapter(out: Path) -> Path:
    return save_adapter(out, per_expert_tensors(hidden=1 << 17, layers=11))


def lorashard(storage: ObjectStorage, *args: object, **env: str) -> Any:
    return run_cli(*args, **storage.environment(**env))


def header_length(weights: Path) -> int:
    return 8 + int.from_bytes(weights.read_bytes()[:8], "little")


# Adapters


@pytest.mark.parametrize("command", [("inspect",), ("plan", "--ep-size", 2)])
def test_of_an_adapter_that_is_looked_at_only_the_header_is_fetched(
    storage: ObjectStorage, adapter: Path, command: tuple[object, ...]
) -> None:
    done = lorashard(storage, *command, ADAPTER)
    assert done.returncode == 0, done.stderr
    length = header_length(adapter / WEIGHTS)
    assert storage.ranges(WEIGHTS) == [(0, 8), (8, length)]
    assert storage.sent_bytes(WEIGHTS) == length


def test_an_adapter_in_a_folder_of_its_name_is_found(storage: ObjectStorage, adapter: Path) -> None:
    storage.put_folder("outer/default", adapter)
    done = lorashard(storage, "inspect", storage.url("outer"))
    assert done.returncode == 0, done.stderr


def test_what_is_added_later_is_seen_by_the_same_process(
    storage: ObjectStorage, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fsspec keeps drivers, and s3fs in them what it listed.
    for name, value in storage.environment().items():
        monkeypatch.setenv(name, value)
    for names in (["first"], ["first", "second"]):
        storage.put_folder(f"growing/{names[-1]}", adapter)
        place = locate(storage.url("growing"))
        assert isinstance(place, RemoteFolder)
        assert place.folders() == names


def test_split_streams_and_is_the_split_of_a_local_adapter(
    tmp_path: Path, storage: ObjectStorage
) -> None:
    adapter = large_adapter(tmp_path / "large")
    size, length = (adapter / WEIGHTS).stat().st_size, header_length(adapter / WEIGHTS)
    assert size > 9 * WINDOW_BYTES  # more than is fetched at once
    storage.put_folder("large", adapter)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = lorashard(
        storage, "split", storage.url("large"), "--ep-size", 2, "-o", tmp_path / "out",
        TMPDIR=str(temporary),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(split_locally(adapter, tmp_path / "local"))
    ranges = storage.ranges(WEIGHTS)
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[:2] == [(0, 8), (8, length)]
    assert storage.sent_bytes(WEIGHTS) == ranges[-1][1] == size
    assert list(temporary.iterdir()) == [], "a copy of the adapter was kept"


def test_of_a_model_only_its_config_is_fetched(tmp_path: Path, storage: ObjectStorage) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 512,
              "moe_intermediate_size": 6}  # fmt: skip
    storage.put("model/config.json", json.dumps(config).encode())
    storage.put("model/model.safetensors", b"x" * 10_000)
    done = lorashard(
        storage, "plan", ADAPTER, "--ep-size", 2, "--model", storage.url("model"), "--json"
    )
    assert done.returncode == 0, done.stderr
    assert {r.path for r in storage.requests if "/model/" in r.path} == {
        "/bucket/model/config.json"
    }


def test_an_adapter_that_is_replaced_meanwhile_is_refused(
    tmp_path: Path, storage: ObjectStorage, adapter: Path
) -> None:
    other = save_adapter(tmp_path / "other", per_expert_tensors(seed=9, hidden=512, layers=3))
    storage.when(WEIGHTS, lambda: storage.put_folder("adapter", other), nth=3)
    done = lorashard(storage, "split", ADAPTER, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "it changed while being read" in done.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("nth", [3, 4])
def test_an_adapter_that_goes_or_shrinks_meanwhile_is_refused(
    tmp_path: Path, storage: ObjectStorage, nth: int
) -> None:
    key = f"adapter/{WEIGHTS}"
    shorter = {3: lambda: storage.put(key, b"x" * 1000), 4: lambda: storage.delete(key)}[nth]
    storage.when(WEIGHTS, shorter, nth=3)
    done = lorashard(storage, "split", ADAPTER, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "it changed while being read" in done.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_broken_connection_and_a_busy_server_are_asked_again(
    tmp_path: Path, storage: ObjectStorage, local_shards: Path
) -> None:
    storage.fail(WEIGHTS, 503, times=1)
    storage.cut_after(WEIGHTS, 50_000, skip=2)
    done = lorashard(storage, "split", ADAPTER, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(local_shards)
    statuses = [r.status for r in storage.requests if r.method == "GET" and WEIGHTS in r.path]
    assert sorted(statuses) == [206, 206, 206, 206, 503]


def test_a_connection_that_always_breaks_is_given_up_soon(
    tmp_path: Path, storage: ObjectStorage
) -> None:
    storage.cut_after(WEIGHTS, 50_000, times=None, skip=2)
    begin = time.monotonic()
    done = lorashard(storage, "split", ADAPTER, "--ep-size", 2, "-o", tmp_path / "out")
    assert time.monotonic() - begin < 10
    assert done.returncode == 3
    assert "cannot be read" in done.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# Places that do not answer


@pytest.mark.parametrize("where", ["s3://no-such-bucket/adapter", ObjectStorage.url("nothing")])
def test_a_bucket_or_a_folder_that_is_not_there_is_told(storage: ObjectStorage, where: str) -> None:
    done = lorashard(storage, "inspect", where)
    assert done.returncode == 3
    assert f"{where}: no such folder" in done.stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, "Are the credentials right"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Set AWS_ACCESS_KEY_ID"),
        # Without a signature, as for what is public.
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "FSSPEC_S3_ANON": "true"},
            "Are the credentials right",
        ),
    ],
)
def test_wrong_and_missing_credentials_are_told_at_once(
    storage: ObjectStorage, keys: dict[str, str], said: str
) -> None:
    begin = time.monotonic()
    done = lorashard(storage, "split", ADAPTER, "--ep-size", 2, **keys)
    assert time.monotonic() - begin < 5
    assert done.returncode == 3
    assert said in done.stderr
    assert "unexpected" not in done.stderr


def test_who_may_read_but_not_list_can_inspect(storage: ObjectStorage) -> None:
    # Then S3 says of what is missing that it is forbidden.
    storage.fail("lorashard.json", 403, times=None, method=None)
    done = lorashard(storage, "inspect", ADAPTER)
    assert done.returncode == 0, done.stderr


def test_a_server_that_does_not_answer_is_told(storage: ObjectStorage) -> None:
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = lorashard(storage, "inspect", ADAPTER, **nobody)
    assert done.returncode == 3
    assert "Could not connect" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_driver_that_is_missing_is_named() -> None:
    done = run_cli("inspect", "gs://bucket/adapter")
    assert done.returncode == 3
    assert "gcsfs" in done.stderr


# Shards


def test_shards_are_verified(storage: ObjectStorage, shards: Path) -> None:
    done = lorashard(storage, "verify", SHARDS, "--against", ADAPTER)
    assert done.returncode == 0, done.stderr
    storage.corrupt(RANK_FILES[1], 4000)
    assert lorashard(storage, "verify", SHARDS).returncode == 5


def test_pull_fetches_no_other_ranks_bytes(
    tmp_path: Path, storage: ObjectStorage, shards: Path
) -> None:
    out = tmp_path / "out"
    done = lorashard(storage, "pull", SHARDS, "--ep-rank", 1, "-o", out)
    assert done.returncode == 0, done.stderr
    expected = contents(shards)
    del expected[RANK_FILES[0]]
    assert contents(out) == expected
    assert not [request for request in storage.requests if RANK_FILES[0] in request.path]
    del expected["adapter_model.safetensors"]  # the same in every shard directory, so not fetched
    for name, content in expected.items():
        assert storage.sent_bytes(name) == len(content)


def test_an_interrupted_pull_goes_on_inside_the_file(
    tmp_path: Path, storage: ObjectStorage
) -> None:
    shards = split_locally(large_adapter(tmp_path / "large"), tmp_path / "shards")
    storage.put_folder("large-shards", shards)
    whole = (shards / RANK_FILES[0]).read_bytes()
    arguments = ("pull", storage.url("large-shards"), "--ep-rank", 0, "-o", tmp_path / "out")
    storage.fail(RANK_FILES[0], 404, times=None, beyond=2 * WINDOW_BYTES)
    assert lorashard(storage, *arguments).returncode == 3
    part = tmp_path / ".out.lorashard-pull" / f"{RANK_FILES[0]}.part"
    assert part.read_bytes() == whole[: 2 * WINDOW_BYTES]
    storage.mend()
    storage.requests.clear()
    done = lorashard(storage, *arguments)
    assert done.returncode == 0, done.stderr
    ranges = storage.ranges(RANK_FILES[0])
    assert (ranges[0][0], ranges[-1][1]) == (2 * WINDOW_BYTES, len(whole))
    assert storage.sent_bytes(RANK_FILES[0]) == len(whole) - 2 * WINDOW_BYTES
    assert storage.sent_bytes("adapter_config.json") == 0
    assert (tmp_path / "out" / RANK_FILES[0]).read_bytes() == whole


def test_a_rank_file_that_is_missing_or_wrong_is_told_and_fetched_when_it_is_right(
    tmp_path: Path, storage: ObjectStorage, shards: Path
) -> None:
    arguments = ("pull", SHARDS, "--ep-rank", 0, "-o", tmp_path / "out")
    storage.delete(f"shards/{RANK_FILES[0]}")
    missing = lorashard(storage, *arguments)
    assert missing.returncode == 5
    assert f"no {RANK_FILES[0]}" in missing.stderr
    storage.put_folder("shards", shards)
    storage.corrupt(RANK_FILES[0], 4000)
    wrong = lorashard(storage, *arguments)
    assert wrong.returncode == 5
    assert "its bytes are not those that were written" in wrong.stderr
    assert not (tmp_path / "out").exists()
    storage.mend()
    assert lorashard(storage, *arguments).returncode == 0
    assert storage.sent_bytes("replicated.safetensors") == (
        (shards / "replicated.safetensors").stat().st_size
    )


@pytest.mark.parametrize("where", [ADAPTER, "s3://no-such-bucket/shards"])
def test_what_is_no_shard_directory_is_not_pulled(
    tmp_path: Path, storage: ObjectStorage, where: str
) -> None:
    done = lorashard(storage, "pull", where, "--ep-rank", 0, "-o", tmp_path / "out")
    assert done.returncode == 5
    assert f"{where}/lorashard.json: no such file" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Whole ways


def test_split_push_and_pull_go_through_the_bucket(
    tmp_path: Path, storage: ObjectStorage, local_shards: Path
) -> None:
    out, place = tmp_path / "out", ObjectStorage.url("published/mine-ep2")
    assert lorashard(storage, "split", ADAPTER, "--ep-size", 2, "-o", out).returncode == 0
    pushed = lorashard(storage, "push", out, place)
    assert (pushed.returncode, pushed.stdout) == (0, f"{place}\n"), pushed.stderr
    puts = [request.path for request in storage.requests if request.method == "PUT"]
    assert puts[-1].endswith("/lorashard.json")
    again = lorashard(storage, "push", out, place)
    assert again.returncode == 5
    assert "--force" in again.stderr
    wider = tmp_path / "wider"
    assert lorashard(storage, "reshard", place, "--ep-size", 4, "-o", wider).returncode == 0
    assert lorashard(storage, "push", wider, place, "--force").returncode == 0
    pulled = tmp_path / "pulled"
    done = lorashard(storage, "pull", place, "--node-ranks", "0-3", "-o", pulled)
    assert done.returncode == 0, done.stderr
    assert contents(pulled) == contents(wider)
    back = tmp_path / "back"
    assert lorashard(storage, "reshard", place, "--ep-size", 2, "-o", back).returncode == 0
    assert contents(back) == contents(local_shards)
    assert lorashard(storage, "merge", place, "-o", tmp_path / "restored").returncode == 0


def test_a_push_without_the_right_to_write_is_told(
    storage: ObjectStorage, local_shards: Path
) -> None:
    done = lorashard(storage, "push", local_shards, "s3://nowhere/mine")
    assert done.returncode == 3
    assert "s3://nowhere/mine" in done.stderr


def test_a_pattern_means_the_adapters_in_a_bucket(
    tmp_path: Path, storage: ObjectStorage, adapter: Path
) -> None:
    for name in ("step-1", "step-2", "other"):
        storage.put_folder(f"runs/{name}", adapter)
    options = ("--ep-size", 2, "-o", tmp_path / "out", "--resume", "--json")
    for expected in ("done", "skipped"):
        done = lorashard(storage, "split", ObjectStorage.url("runs/step-*"), *options)
        assert done.returncode == 0, done.stderr
        found = {Path(item["out"]).name: item["status"] for item in json.loads(done.stdout)}
        assert found == {"step-1-ep2": expected, "step-2-ep2": expected}
