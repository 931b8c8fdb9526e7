"""Adapters and shards that are elsewhere: on a server like the Hub's, read by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorashard import verify_shards
from tests.hub_server import HubServer
from tests.tiny import (
    RANK_FILES,
    contents,
    mounted_tmpfs,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_config,
)

WEIGHTS = "adapter_model.safetensors"
REPO = "owner/adapter"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def files_of(directory: Path) -> dict[str, bytes | Path]:
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture
def adapter(tmp_path: Path, hub: HubServer) -> Path:
    directory = save_adapter(tmp_path / "adapter", per_expert_tensors(hidden=512, layers=3))
    hub.add_repo(REPO, files_of(directory))
    return directory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def lorashard(hub: HubServer, home: Path, *args: object, **env: str) -> Any:
    return run_cli(*args, **hub.environment(home) | env)


def header_length(weights: Path) -> int:
    return 8 + int.from_bytes(weights.read_bytes()[:8], "little")


def without_place(manifest: Path) -> dict[str, Any]:
    document = json.loads(manifest.read_text())
    document["source"] |= {"repo": None, "revision": None}
    del document["blake3"]  # of all else
    return document


def split_locally(adapter: Path, out: Path) -> Path:
    assert run_cli("split", adapter, "--ep-size", 2, "-o", out).returncode == 0
    return out


def test_inspect_and_plan_fetch_the_header_and_nothing_else(
    tmp_path: Path, hub: HubServer, home: Path
) -> None:
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{name}.lora_{m}.weight": torch.ones(
            shape
        )
        for layer in range(45)
        for e in range(128)
        for name, (inner, out) in {
            "gate_proj": (4, 2), "up_proj": (4, 2), "down_proj": (2, 4),
        }.items()
        for m, shape in (("A", (2, inner)), ("B", (out, 2)))
    }  # fmt: skip
    directory = tmp_path / "large"
    save_config(directory)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    assert len(tensors) == 34_560
    hub.add_repo("owner/large", files_of(directory))
    wanted = [(0, 8), (8, header_length(directory / WEIGHTS))]
    for command in (("inspect",), ("plan", "--ep-size", 8)):
        hub.clear()
        done = lorashard(hub, home, *command, "hf://owner/large")
        assert done.returncode == 0, done.stderr
        assert hub.ranges(WEIGHTS) == wanted
        assert hub.sent_bytes(WEIGHTS) == header_length(directory / WEIGHTS)
    assert not list(home.rglob(WEIGHTS))


@pytest.mark.parametrize("name", ["hf://owner/adapter", "owner/adapter", "hf://owner/adapter@main"])
def test_split_of_a_hub_adapter_streams_and_is_the_split_of_a_local_one(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path, name: str
) -> None:
    out, local = tmp_path / "out", split_locally(adapter, tmp_path / "local")
    done = lorashard(hub, home, "split", name, "--ep-size", 2, "-o", out)
    assert done.returncode == 0, done.stderr
    assert {k: v for k, v in contents(out).items() if k != "lorashard.json"} == {
        k: v for k, v in contents(local).items() if k != "lorashard.json"
    }
    assert without_place(out / "lorashard.json") == without_place(local / "lorashard.json")
    source = json.loads((out / "lorashard.json").read_text())["source"]
    assert (source["repo"], source["revision"]) == (REPO, hub.head(REPO))
    assert not list(home.rglob(WEIGHTS)), "a copy of the adapter was kept"
    assert hub.sent_bytes(WEIGHTS) == (adapter / WEIGHTS).stat().st_size


def test_a_branch_that_moves_meanwhile_changes_nothing(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    first = hub.head(REPO)
    other = save_adapter(tmp_path / "other", per_expert_tensors(seed=9, hidden=512, layers=3))
    hub.when(WEIGHTS, lambda: hub.commit(REPO, files_of(other)), nth=2)
    out, local = tmp_path / "out", split_locally(adapter, tmp_path / "local")
    assert lorashard(hub, home, "split", REPO, "--ep-size", 2, "-o", out).returncode == 0
    assert hub.head(REPO) != first
    assert json.loads((out / "lorashard.json").read_text())["source"]["revision"] == first
    assert (out / RANK_FILES[0]).read_bytes() == (local / RANK_FILES[0]).read_bytes()


def test_a_broken_connection_is_tried_again(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    hub.cut_after(WEIGHTS, 1000, times=2)
    done = lorashard(hub, home, "split", REPO, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_read_is_an_error_that_leaves_nothing(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    # After a redirect and an answer for the header's length, and the same for the header.
    hub.fail(WEIGHTS, status=404, times=None, method="GET", skip=4)
    done = lorashard(hub, home, "split", REPO, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "cannot be read" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_private_repository_needs_a_token(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    hub.add_repo("owner/private", files_of(adapter), private=True)
    refused = lorashard(hub, home, "inspect", "hf://owner/private")
    assert refused.returncode == 3
    assert "HF_TOKEN" in refused.stderr
    assert lorashard(hub, home, "inspect", "hf://owner/private", HF_TOKEN=hub.token).returncode == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://owner/missing", "Is the name right?"),
        ("owner/missing", "no such directory here"),
        ("hf://owner/adapter@gone", "Is the revision right?"),
        ("hf://owner/adapter/sub", "no such folder"),
        ("hf://owner", "hf://owner"),
        ("s4://bucket/adapter", "Is the part before :// right?"),
    ],
)
def test_what_is_not_there_is_told(
    hub: HubServer, adapter: Path, home: Path, name: str, said: str
) -> None:
    done = lorashard(hub, home, "inspect", name)
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_of_a_model_on_the_hub_only_its_config_is_fetched(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 512,
              "moe_intermediate_size": 6}  # fmt: skip
    model = {"config.json": json.dumps(config).encode(), "model.safetensors": b"x" * 10_000}
    hub.add_repo("owner/model", model)
    done = lorashard(
        hub, home, "split", REPO, "--ep-size", 2, "-o", tmp_path / "out", "--model", "owner/model"
    )
    assert done.returncode == 0, done.stderr
    assert hub.sent_bytes("/config.json") == len(model["config.json"])
    assert hub.sent_bytes("/model.safetensors") == 0
    hub.commit("owner/model", {"config.json": json.dumps(config | {"num_experts": 2}).encode()})
    wrong = lorashard(hub, home, "plan", REPO, "--ep-size", 2, "--model", "owner/model")
    assert wrong.returncode == 3


def test_shards_on_the_hub_are_verified_against_an_adapter_there(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    shards = split_locally(adapter, tmp_path / "shards")
    hub.add_repo("owner/shards", files_of(shards) | {"README.md": b"# a card"})
    arguments = ("verify", "hf://owner/shards", "--against", "hf://owner/adapter")
    done = lorashard(hub, home, *arguments)
    assert done.returncode == 0, done.stderr
    damaged = bytearray((shards / RANK_FILES[1]).read_bytes())
    damaged[-1] ^= 1
    hub.commit("owner/shards", {RANK_FILES[1]: bytes(damaged)})
    assert lorashard(hub, home, *arguments).returncode == 5


def test_offline_the_hubs_own_cache_is_read(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    refused = lorashard(hub, home, "inspect", "hf://owner/adapter", HF_HUB_OFFLINE="1")
    assert refused.returncode == 3
    assert "HF_HUB_OFFLINE" in refused.stderr
    shards = split_locally(adapter, tmp_path / "shards")
    hub.add_repo("owner/shards", files_of(shards))
    download = "from huggingface_hub import snapshot_download as d; d('owner/shards')"
    subprocess.run([sys.executable, "-c", download], env=hub.environment(home), check=True)
    hub.clear()
    done = lorashard(hub, home, "inspect", "hf://owner/shards", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []


# pull


@pytest.fixture
def shards(tmp_path: Path, hub: HubServer, adapter: Path) -> Path:
    directory = split_locally(adapter, tmp_path / "shards")
    hub.add_repo("owner/shards", files_of(directory) | {"README.md": b"# a card"})
    hub.clear()
    return directory


def test_pull_fetches_no_other_ranks_bytes(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    out = tmp_path / "out"
    done = lorashard(hub, home, "pull", "hf://owner/shards", "--ep-rank", 1, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    expected = contents(shards)
    del expected[RANK_FILES[0]]
    assert contents(out) == expected
    assert hub.sent_bytes(RANK_FILES[0]) == 0
    assert hub.sent_bytes(RANK_FILES[1]) == len(expected[RANK_FILES[1]])
    assert json.loads(done.stdout)["revision"] == hub.head("owner/shards")
    assert run_cli("inspect", out).returncode == 0


def test_a_second_pull_adds_what_is_missing(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    out = tmp_path / "out"
    for ranks in (("--ep-rank", 1), ("--node-ranks", "0-1")):
        assert lorashard(hub, home, "pull", "owner/shards", *ranks, "-o", out).returncode == 0
    assert contents(out) == contents(shards)
    assert hub.sent_bytes(RANK_FILES[1]) == (shards / RANK_FILES[1]).stat().st_size
    assert run_cli("verify", out).returncode == 0


def test_an_interrupted_pull_goes_on_where_it_was(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("pull", "owner/shards", "--ep-rank", 0, "-o", out)
    hub.fail(RANK_FILES[0], status=404, times=None)
    assert lorashard(hub, home, *arguments).returncode != 0
    assert not out.exists()
    replicated = hub.sent_bytes("replicated.safetensors")
    assert replicated > 0
    hub.mend()
    assert lorashard(hub, home, *arguments).returncode == 0
    assert hub.sent_bytes("replicated.safetensors") == replicated
    expected = contents(shards)
    del expected[RANK_FILES[1]]
    assert contents(out) == expected
    assert not [path for path in tmp_path.iterdir() if "lorashard-pull" in path.name]


def test_half_a_file_is_not_fetched_twice(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    work = tmp_path / ".out.lorashard-pull"
    work.mkdir()
    (work / "lorashard.json").write_bytes((shards / "lorashard.json").read_bytes())
    whole = (shards / RANK_FILES[0]).read_bytes()
    (work / f"{RANK_FILES[0]}.part").write_bytes(whole[:5000])
    arguments = ("pull", "owner/shards", "--ep-rank", 0, "-o", tmp_path / "out")
    assert lorashard(hub, home, *arguments).returncode == 0
    assert hub.ranges(RANK_FILES[0]) == [(5000, len(whole))]
    assert (tmp_path / "out" / RANK_FILES[0]).read_bytes() == whole


def test_wrong_bytes_are_refused_and_fetched_again_next_time(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    hub.corrupt(RANK_FILES[0], 4000, times=None)
    arguments = ("pull", "owner/shards", "--ep-rank", 0, "-o", tmp_path / "out")
    done = lorashard(hub, home, *arguments)
    assert done.returncode == 5
    assert "its bytes are not those that were written" in done.stderr
    assert not (tmp_path / "out").exists()
    hub.mend()
    assert lorashard(hub, home, *arguments).returncode == 0


def test_another_version_begins_anew_and_does_not_mix(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    arguments = ("pull", "owner/shards", "--ep-rank", 0, "-o", tmp_path / "out")
    hub.fail(RANK_FILES[0], status=404, times=None)
    assert lorashard(hub, home, *arguments).returncode != 0
    hub.mend()
    other = save_adapter(tmp_path / "other", per_expert_tensors(seed=5, hidden=512, layers=3))
    renewed = split_locally(other, tmp_path / "renewed")
    hub.commit("owner/shards", files_of(renewed))
    assert lorashard(hub, home, *arguments).returncode == 0
    assert (tmp_path / "out" / "replicated.safetensors").read_bytes() == (
        renewed / "replicated.safetensors"
    ).read_bytes()
    # A finished directory of another version is not touched without --force.
    hub.commit("owner/shards", files_of(shards))
    assert lorashard(hub, home, *arguments).returncode == 5
    assert lorashard(hub, home, *arguments, "--force").returncode == 0
    assert (tmp_path / "out" / RANK_FILES[0]).read_bytes() == (shards / RANK_FILES[0]).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--ep-rank", 2), "no ep rank 2", 5),
        ((), "No rank is named", 4),
        (("--node-ranks", "3-1"), "is not a range", 4),
        (("--node-ranks", "all"), "is not a range", 4),
    ],
)
def test_ranks_that_are_not_there_are_told(
    tmp_path: Path, shards: Path, arguments: tuple[object, ...], said: str, code: int
) -> None:
    done = run_cli("pull", shards, *arguments, "-o", tmp_path / "out")
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.lorashard-pull").exists()


def test_a_place_that_is_no_shard_directory_is_told(
    tmp_path: Path, hub: HubServer, adapter: Path, home: Path
) -> None:
    done = lorashard(hub, home, "pull", REPO, "--ep-rank", 0, "-o", tmp_path / "out")
    assert done.returncode != 0
    assert "lorashard.json" in done.stderr


def test_a_local_directory_and_a_url_are_pulled_alike(tmp_path: Path, shards: Path) -> None:
    for name in (str(shards), shards.as_uri()):
        out = tmp_path / f"out-{len(name)}"
        assert run_cli("pull", name, "--node-ranks", "0-1", "-o", out).returncode == 0
        assert contents(out) == contents(shards)


def test_a_pull_onto_a_mount_point_is_resumed_and_added_to(
    tmp_path: Path, hub: HubServer, shards: Path, home: Path
) -> None:
    with mounted_tmpfs(tmp_path / "mount", "size=8m") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        out = tmp_path / "mount"
        hub.fail(RANK_FILES[0], 404, times=None, method="GET")
        failed = lorashard(hub, home, "pull", "owner/shards", "--ep-rank", 0, "-o", out)
        assert failed.returncode == 3, failed.stderr
        assert "lorashard.json" not in os.listdir(out)
        hub.mend()
        for ep_rank in (0, 1):
            done = lorashard(hub, home, "pull", "owner/shards", "--ep-rank", ep_rank, "-o", out)
            assert done.returncode == 0, done.stderr
            assert RANK_FILES[ep_rank] in os.listdir(out)
        assert contents(out) == contents(shards)


@pytest.fixture
def remote_shards(tmp_path: Path, hub: HubServer, adapter: Path) -> Path:
    """Local shards on three ranks, which are owner/shards on the Hub."""
    out = tmp_path / "shards"
    assert run_cli("split", adapter, "--ep-size", 3, "-o", out).returncode == 0
    hub.add_repo("owner/shards", files_of(out))
    return out


def test_reshard_streams_and_fetches_each_byte_once(
    tmp_path: Path, hub: HubServer, adapter: Path, remote_shards: Path, home: Path
) -> None:
    local = split_locally(adapter, tmp_path / "local")
    hub.cut_after("ep-00001-of-00003", 1000)
    options = ("--ep-size", 2, "-o", tmp_path / "out")
    done = lorashard(hub, home, "reshard", "hf://owner/shards", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(local)
    assert json.loads(done.stdout)["revision"] == hub.head("owner/shards")
    for path in remote_shards.glob("ep-*"):
        again = 1000 if "ep-00001" in path.name else 0
        assert hub.sent_bytes(path.name) == path.stat().st_size + again
    assert not list(home.rglob("*.safetensors"))


def test_reshard_of_what_is_damaged_on_the_way_leaves_nothing(
    tmp_path: Path, hub: HubServer, remote_shards: Path, home: Path
) -> None:
    size = (remote_shards / "ep-00002-of-00003.safetensors").stat().st_size
    hub.corrupt("ep-00002-of-00003", size - 1)
    done = lorashard(hub, home, "reshard", "owner/shards", "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 5
    assert "ep-00002-of-00003.safetensors: BLAKE3 differs" in done.stderr
    hub.mend()
    hub.commit("owner/shards", {"ep-00002-of-00003.safetensors": None})
    done = lorashard(hub, home, "reshard", "owner/shards", "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 5
    assert "no ep-00002-of-00003.safetensors" in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_merge_and_convert_give_the_adapter_back_from_remote_shards(
    tmp_path: Path, hub: HubServer, adapter: Path, remote_shards: Path, home: Path
) -> None:
    done = lorashard(hub, home, "merge", "owner/shards", "-o", tmp_path / "restored")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "restored") == contents(adapter)
    done = lorashard(
        hub, home, "convert", "owner/shards", "--layout", "per_expert", "-o", tmp_path / "plain"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


API = """
import sys
import lorashard
out = sys.argv[1]
assert lorashard.verify_shards("hf://owner/shards", against="hf://owner/adapter") == ()
assert lorashard.verify_shards("owner/shards", ep_ranks=[2]) == ()
lorashard.merge_shards("hf://owner/shards", f"{out}/merged")
lorashard.convert_shards("hf://owner/shards", f"{out}/plain", "per_expert")
shards = lorashard.open_shards("hf://owner/shards")
name = "model.layers.0.mlp.experts.gate_proj.lora_A"
assert len(shards.rank(2).read_bytes(name)) == 2 * 512 * 2
request = lorashard.SplitRequest(ep_size=3)
lorashard.split_adapter("hf://owner/adapter", f"{out}/split", request)
lorashard.split_adapter("hf://owner/adapter", f"{out}/split", request, resume=True)
try:
    lorashard.open_shards("hf://owner/adapter")
except lorashard.LorashardError as err:
    print(type(err).__name__, err.message)
"""


def test_the_python_functions_take_hub_ids_too(
    tmp_path: Path, hub: HubServer, adapter: Path, remote_shards: Path, home: Path
) -> None:
    command = [sys.executable, "-c", API, str(tmp_path)]
    environment = hub.environment(home) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ManifestError hf://owner/adapter/lorashard.json: no such file.\n"
    assert contents(tmp_path / "merged") == contents(adapter)
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert verify_shards(tmp_path / "split", against=adapter) == ()
    rank_2 = "ep-00002-of-00003.safetensors"
    assert hub.sent_bytes(rank_2) == (remote_shards / rank_2).stat().st_size, "kept in the cache"
