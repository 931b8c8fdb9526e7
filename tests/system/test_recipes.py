"""docs/recipes/: what can be run of them without a GPU and without a cluster."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from blake3 import blake3

import lorashard
from tests.adapters import Spec, build
from tests.hub_server import HubServer
from tests.tiny import REPO, run_cli, save_adapter

RECIPES = REPO / "docs" / "recipes"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO)}
KUBERNETES = "1.37.0"


# Kubernetes: the manifests of the page


def manifests() -> list[dict[str, Any]]:
    """All YAML of the page; the fragment with init containers as a pod of its own."""
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (RECIPES / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    documents = [document for block in blocks for document in yaml.safe_load_all(block)]
    return [document if "kind" in document else _as_pod(document) for document in documents]


def _as_pod(fragment: dict[str, Any]) -> dict[str, Any]:
    containers = [{"name": "vllm", "image": "any"}]
    spec = {"containers": containers} | fragment
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "split"}, "spec": spec}


def pod_of(kind: str) -> dict[str, Any]:
    """The pod's spec of the page's only manifest of that kind."""
    (spec,) = (m["spec"] for m in manifests() if m["kind"] == kind)
    found: dict[str, Any] = spec if kind == "Pod" else spec["template"]["spec"]
    return found


class Volumes:
    """What a pod mounts, as directories below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(
        self, container: dict[str, Any], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a container's command as the kubelet makes it, its mounts below `root`."""
        words = [_expanded(w, environment) for w in container["command"] + container["args"]]
        for mount in container["volumeMounts"]:
            path = mount["mountPath"]
            (self.root / path[1:]).mkdir(parents=True, exist_ok=True)
            words = [re.sub(rf"(?<![\w/]){path}\b", str(self.root) + path, w) for w in words]
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            words, env=environment | {"PATH": programs, "PYTHONPATH": str(REPO)},
            cwd=self.root, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def names(self, path: str) -> set[str]:
        return set(os.listdir(self.root / path[1:]))


def _expanded(word: str, environment: dict[str, str]) -> str:
    """`$(NAME)` of a command, as Kubernetes has it: what is not known stays, `$$` is `$`."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else environment.get(found[1], found[0]),
        word,
    )


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def upload(hub: HubServer, tmp_path: Path, repo: str, ep_size: int, seed: int = 0) -> Path:
    """A directory cut for `ep_size` ranks, with a tag v1 on a repository that needs a token."""
    adapter, shards = tmp_path / f"adapter{seed}", tmp_path / f"shards{seed}"
    build(Spec("L1", num_experts=ep_size, fill="random", seed=seed)).write(adapter)
    assert run_cli("split", adapter, "--ep-size", ep_size, "-o", shards).returncode == 0
    files = {path.name: path for path in shards.iterdir()}
    if repo not in hub.repos:
        hub.add_repo(repo, files, private=True)
    else:
        hub.commit(repo, files)
    hub.tag(repo, "v1", hub.head(repo))
    return shards


def rank_files(ranks: range, ep_size: int) -> set[str]:
    return {f"ep-{k:05}-of-{ep_size:05}.safetensors" for k in ranks}


SHARED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorashard.json",
    "replicated.safetensors",
}


@pytest.mark.parametrize("manifest", manifests(), ids=lambda m: m["kind"])
def test_manifest_is_valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_vllm_serves_from_where_the_init_container_writes(kind: str) -> None:
    pod = pod_of(kind)
    (init,), (vllm,) = pod["initContainers"], pod["containers"]
    assert "-o /shards/mine-v1" in " ".join(init["args"])
    assert "--lora-modules mine=/shards/mine-v1" in " ".join(vllm["args"])
    declared = {volume["name"] for volume in pod["volumes"]}
    assert {m["name"] for c in (init, vllm) for m in c["volumeMounts"]} <= declared


def test_init_container_pulls_and_can_start_again(tmp_path: Path, hub: HubServer) -> None:
    (container,) = pod_of("Deployment")["initContainers"]
    volumes, environment = Volumes(tmp_path / "node"), hub.environment(tmp_path, hub.token)
    upload(hub, tmp_path, "owner/mine-ep8", 8)
    for _ in range(2):
        done = volumes.start(container, environment)
        assert done.returncode == 0, done.stderr
        assert volumes.names("/shards/mine-v1") == SHARED | rank_files(range(8), 8)
    assert lorashard.verify_shards(tmp_path / "node" / "shards" / "mine-v1") == ()


@pytest.mark.parametrize("index", [0, 1])
def test_each_pod_of_the_set_pulls_the_ranks_of_its_index(
    tmp_path: Path, hub: HubServer, index: int
) -> None:
    (container,) = pod_of("StatefulSet")["initContainers"]
    upload(hub, tmp_path, "owner/mine-ep16", 16)
    volumes = Volumes(tmp_path / "node")
    environment = hub.environment(tmp_path, hub.token) | {"POD_INDEX": str(index)}
    done = volumes.start(container, environment)
    assert done.returncode == 0, done.stderr
    own = range(8 * index, 8 * index + 8)
    assert volumes.names("/shards/mine-v1") == SHARED | rank_files(own, 16)
    pulled = lorashard.open_shards(tmp_path / "node" / "shards" / "mine-v1")
    for name in ("replicated.safetensors", *rank_files(own, 16)):
        content = (tmp_path / "node" / "shards" / "mine-v1" / name).read_bytes()
        assert blake3(content).hexdigest() == pulled.manifest.files[name].digest.blake3


def test_a_version_that_was_replaced_is_refused_and_the_old_one_stays(
    tmp_path: Path, hub: HubServer
) -> None:
    (container,) = pod_of("Deployment")["initContainers"]
    volumes, environment = Volumes(tmp_path / "node"), hub.environment(tmp_path, hub.token)
    upload(hub, tmp_path, "owner/mine-ep8", 8)
    assert volumes.start(container, environment).returncode == 0
    manifest = tmp_path / "node" / "shards" / "mine-v1" / "lorashard.json"
    before = manifest.read_bytes()
    upload(hub, tmp_path, "owner/mine-ep8", 8, seed=1)
    done = volumes.start(container, environment)
    assert (done.returncode, "exists" in done.stderr) == (5, True)
    assert manifest.read_bytes() == before


def test_two_pods_that_pull_to_one_place_exclude_each_other(tmp_path: Path, hub: HubServer) -> None:
    (container,) = pod_of("Deployment")["initContainers"]
    volumes, environment = Volumes(tmp_path / "node"), hub.environment(tmp_path, hub.token)
    upload(hub, tmp_path, "owner/mine-ep8", 8)
    work = tmp_path / "node" / "shards" / ".mine-v1.lorashard-pull"
    work.mkdir(parents=True)
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the other pod's pull does
    done = volumes.start(container, environment)
    assert (done.returncode, "another lorashard" in done.stderr) == (5, True)
    os.close(lock)
    assert volumes.start(container, environment).returncode == 0


def test_a_container_that_splits_can_start_again(tmp_path: Path) -> None:
    (container,) = pod_of("Pod")["initContainers"]
    volumes = Volumes(tmp_path / "node")
    build(Spec("L1", num_experts=8)).write(tmp_path / "node" / "adapters" / "mine")
    config = {"model_type": "qwen3_moe", "num_experts": 8, "hidden_size": 6,
              "moe_intermediate_size": 5}  # fmt: skip
    model = tmp_path / "node" / "models" / "glm"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        done = volumes.start(container, dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert volumes.names("/shards/mine-v1") == SHARED | rank_files(range(8), 8)
    assert "already there" in done.stderr
    replaced = build(Spec("L1", num_experts=8, fill="random", seed=1))
    shutil.rmtree(tmp_path / "node" / "adapters")
    replaced.write(tmp_path / "node" / "adapters" / "mine")
    before = (tmp_path / "node" / "shards" / "mine-v1" / "lorashard.json").read_bytes()
    assert volumes.start(container, dict(os.environ)).returncode == 5
    assert (tmp_path / "node" / "shards" / "mine-v1" / "lorashard.json").read_bytes() == before


# The loop: rl_swaps.py


@contextmanager
def endpoints(fault: str = "") -> Iterator[tuple[str, int]]:
    """URL and process id of tests/lora_endpoints.py, which only stands in for vLLM's endpoints."""
    command = [sys.executable, "-m", "tests.lora_endpoints", fault]
    with subprocess.Popen(
        command, cwd=REPO, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.kill()


def post(url: str, document: object) -> None:
    with urllib.request.urlopen(url, json.dumps(document).encode()):
        pass


def swap(
    tmp_path: Path, server: str, *options: object, status: int = 0, steps: int = 10
) -> dict[str, Any]:
    """The report of rl_swaps.py."""
    adapter = save_adapter(tmp_path / "adapter")
    command = [sys.executable, RECIPES / "rl_swaps.py", "--server", server, "--adapter", adapter,
               "--workdir", tmp_path / "work", "--steps", steps, *options]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("form", [("--ep-size", 2), ("--plain",)])
def test_every_step_serves_a_new_name_from_a_new_path_and_takes_the_oldest_away(
    tmp_path: Path, form: tuple[object, ...]
) -> None:
    with endpoints() as (server, _):
        report = swap(tmp_path, server, *form, "--keep", 2)
        with urllib.request.urlopen(server + "/events") as answer:
            events = json.loads(answer.read())
    assert "failure" not in report
    assert (report["steps"], report["wrong"]) == (11, [])
    assert report["version_0_again"] == {"gap": 0.0, "right": True}
    assert report["rows"][8]["scale"] == report["rows"][0]["scale"]
    names = [f"mine-v{n:05}" for n in range(11)]
    loads = [event for event in events if event.startswith("loaded")]
    assert loads == [f"loaded {name}" for name in names]
    assert events[:4] == ["loaded mine-v00000", "loaded mine-v00001", "loaded mine-v00002",
                          "unloaded mine-v00000"]  # fmt: skip
    assert sorted(e.split()[1] for e in events if e.startswith("unloaded")) == names
    assert not list((tmp_path / "work").iterdir())


def test_what_a_step_serves_is_a_shard_directory_of_that_version(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    taken = {"lora_name": "mine-v00001", "lora_path": str(tmp_path)}
    with endpoints() as (server, _):
        post(server + "/v1/load_lora_adapter", taken)  # so the script stops when it comes to it
        report = swap(tmp_path, server, "--ep-size", 2, status=1)
    assert "has already been loaded" in report["failure"]
    served, source = tmp_path / "work" / "mine-v00001", tmp_path / "adapter"
    assert lorashard.verify_shards(served) == ()
    lorashard.merge_shards(served, tmp_path / "merged")
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], -tensor if "lora_B" in name else tensor), name


@pytest.mark.parametrize("fault", ["stale", "cache"])
def test_answers_of_another_version_are_found(tmp_path: Path, fault: str) -> None:
    with endpoints(fault) as (server, _):
        report = swap(tmp_path, server, "--ep-size", 2, status=1)
    assert report["wrong"][0] == (4 if fault == "stale" else 1)
    assert "failure" not in report


@pytest.mark.parametrize(("fault", "flat"), [("", True), ("leak", False)])
def test_memory_that_grows_with_every_load_is_found(tmp_path: Path, fault: str, flat: bool) -> None:
    with endpoints(fault) as (server, pid):
        report = swap(tmp_path, server, "--ep-size", 2, "--pid", pid, steps=100)
    memory = report["memory"]
    assert memory["flat"] is flat, memory
    assert memory["pss_mb"]["per_step"] == pytest.approx(0.0 if flat else 1.0, abs=0.1)


def test_too_few_steps_say_nothing_about_memory(tmp_path: Path) -> None:
    with endpoints() as (server, pid):
        report = swap(tmp_path, server, "--ep-size", 2, "--pid", pid)
    assert report["memory"]["flat"] is None


def test_a_server_that_refuses_ends_the_script_with_its_words(tmp_path: Path) -> None:
    report = swap(tmp_path, "http://127.0.0.1:9", "--ep-size", 2, status=1)
    assert "refused" in report["failure"]
