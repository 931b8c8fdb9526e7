"""docs/recipes/stacks.md: what can be run of it without a cluster and without the stacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.hub_server import HubServer
from tests.system.test_recipes import KUBERNETES, RECIPES, SHARED, Volumes, rank_files, upload

DOCUMENTS: tuple[Any, ...] = tuple(
    yaml.safe_load(block)
    for block in re.findall(
        r"^```yaml\n(.*?)^```", (RECIPES / "stacks.md").read_text(), re.MULTILINE | re.DOTALL
    )
)
VALUES, LORA_ADAPTER, KSERVE, POD = DOCUMENTS


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_the_pod_is_valid_and_its_plugins_name_lorashard() -> None:
    kubernetes_validate.validate(POD, KUBERNETES, strict=True)
    (vllm,) = POD["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in vllm["env"]}
    assert "lorashard" in environment["VLLM_PLUGINS"].split(",")
    assert environment["VLLM_LORA_RESOLVER_CACHE_DIR"] == "/shards"


@pytest.mark.parametrize("stack", ["production-stack", "llm-d"])
def test_an_init_container_pulls_what_the_server_is_given(
    tmp_path: Path, hub: HubServer, stack: str
) -> None:
    upload(hub, tmp_path, "owner/mine-ep8", 8)
    if stack == "llm-d":
        (container,), place = POD["spec"]["initContainers"], "/shards/mine-v1"
    else:
        (model,) = VALUES["servingEngineSpec"]["modelSpec"]
        # The chart mounts the model's volume at /data, for both containers.
        container = model["initContainer"] | {"volumeMounts": [{"mountPath": "/data"}]}
        place = LORA_ADAPTER["spec"]["adapterSource"]["adapterPath"]
    volumes = Volumes(tmp_path / "node")
    done = volumes.start(container, hub.environment(tmp_path, hub.token))
    assert done.returncode == 0, done.stderr
    assert volumes.names(place) == SHARED | rank_files(range(8), 8)


def test_every_server_has_expert_parallelism_and_room_for_the_adapter() -> None:
    (model,) = VALUES["servingEngineSpec"]["modelSpec"]
    assert "--enable-expert-parallel" in model["vllmConfig"]["extraArgs"]
    (main,) = KSERVE["spec"]["template"]["containers"]
    assert "--enable-expert-parallel" in main["env"][0]["value"]
    lora = KSERVE["spec"]["model"]["lora"]
    assert lora["maxCpuAdapters"] >= 2 * len(lora["adapters"])  # each under two names
    assert "--enable-expert-parallel" in POD["spec"]["containers"][0]["args"]
