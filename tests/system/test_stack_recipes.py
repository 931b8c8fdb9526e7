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
VALUES, LORA_ADAPTER, KSERVE, POD, DYNAMO, DYNAMO_MODEL = DOCUMENTS
DYNAMO_PODS = [component["podTemplate"]["spec"] for component in DYNAMO["spec"]["components"]]


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


def test_what_the_resolver_asks_for_is_the_model_that_is_served() -> None:
    """The resolver compares the adapter's base model with what `vllm serve` is given, not with other names."""
    (vllm,) = POD["spec"]["containers"]
    assert vllm["command"] == ["vllm", "serve", DYNAMO_MODEL["spec"]["baseModelName"]]
    assert not {"--model", "--served-model-name"} & set(vllm["args"])
    assert "HF_HUB_OFFLINE" not in {entry["name"] for entry in vllm["env"]}


@pytest.mark.parametrize("spec", DYNAMO_PODS)
def test_pods_of_dynamo_are_valid(spec: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dynamo"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_dynamo_loads_onto_workers_of_the_adapters_base_model() -> None:
    worker = DYNAMO["spec"]["components"][1]
    (main,) = worker["podTemplate"]["spec"]["containers"]
    assert worker["modelRef"]["name"] == DYNAMO_MODEL["spec"]["baseModelName"]
    assert main["args"][:2] == ["--model", worker["modelRef"]["name"]]
    assert "--enable-expert-parallel" in main["args"]
    # Dynamo's operator refuses file://.
    assert DYNAMO_MODEL["spec"]["source"]["uri"].startswith("s3://")


@pytest.mark.parametrize("stack", ["production-stack", "llm-d", "dynamo"])
def test_an_init_container_pulls_what_the_server_is_given(
    tmp_path: Path, hub: HubServer, stack: str
) -> None:
    upload(hub, tmp_path, "owner/mine-ep8", 8)
    if stack == "llm-d":
        (container,), place = POD["spec"]["initContainers"], "/shards/mine-v1"
    elif stack == "dynamo":
        (container,) = DYNAMO_PODS[1]["initContainers"]
        (place,) = re.findall(r'"uri": "file://([^"]*)"', (RECIPES / "stacks.md").read_text())
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
