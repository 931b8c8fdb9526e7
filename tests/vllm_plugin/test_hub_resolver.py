"""vLLM's Hub resolver, of real releases, and shard directories in repositories of a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters import Spec, build
from tests.hub_server import HubServer
from tests.tiny import REPO, run_cli
from tests.vllm_release import END_RELEASES, require_release

pytestmark = pytest.mark.parametrize("release", END_RELEASES)

# What a server does with VLLM_PLUGINS and the list of repositories, and a request's model.
SCRIPT = """
import asyncio, json, sys
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.plugins import load_plugins_by_group
from vllm.plugins.lora_resolvers.hf_hub_resolver import register_hf_hub_resolver

register_hf_hub_resolver()
resolver = LoRAResolverRegistry.get_resolver("Hf Hub Resolver")
found = [asyncio.run(resolver.resolve_lora("tiny/moe", name)) for name in sys.argv[1:]]
plugins = load_plugins_by_group("vllm.general_plugins")
print(json.dumps([sorted(plugins), [request and request.lora_path for request in found]]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    build(Spec("L1", num_experts=2)).write(folder / "plain")
    assert run_cli("split", folder / "plain", "--ep-size", 2, "-o", folder / "mine").returncode == 0
    return folder / "mine"


@pytest.fixture
def hub(shards: Path) -> Iterator[HubServer]:
    """A repository that is a shard directory, and one that has them in folders."""
    files = {path.name: path for path in shards.iterdir()}
    with HubServer() as server:
        server.add_repo("owner/mine", files)
        server.add_repo("owner/many", {f"mine-v1/{name}": file for name, file in files.items()})
        yield server


def resolved(release: str, hub: HubServer, home: Path, names: list[str]) -> list[str | None]:
    """The paths that requests for these models get. A process of its own: HF_ENDPOINT is read early."""
    environment = hub.environment(home) | {
        "PYTHONPATH": os.pathsep.join([str(require_release(release)), str(REPO)]),
        "VLLM_PLUGINS": "lora_hf_hub_resolver,lorashard",
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "owner/mine,owner/many",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plugins, found = json.loads(done.stdout.splitlines()[-1])
    assert "lorashard" in plugins
    paths: list[str | None] = found
    return paths


def test_repositories_and_folders_of_them_arrive_whole(
    hub: HubServer, tmp_path: Path, release: str
) -> None:
    names = ["owner/mine", "owner/many/mine-v1", "owner/many/mine-v2", "other/mine"]
    paths = resolved(release, hub, tmp_path, names)
    assert paths[2:] == [None, None]
    for path in paths[:2]:
        assert path is not None
        verified = run_cli("verify", path)
        assert verified.returncode == 0, verified.stderr
