"""docs/recipes/: what can be run of them without a GPU and without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import REPO, save_adapter

RECIPES = REPO / "docs" / "recipes"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO)}


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
    names = [f"mine-v{n:04}" for n in range(11)]
    loads = [event for event in events if event.startswith("loaded")]
    assert loads == [f"loaded {name}" for name in names]
    assert events[:4] == ["loaded mine-v0000", "loaded mine-v0001", "loaded mine-v0002",
                          "unloaded mine-v0000"]  # fmt: skip
    assert sorted(e.split()[1] for e in events if e.startswith("unloaded")) == names
    assert not list((tmp_path / "work").iterdir())


def test_what_a_step_serves_is_a_shard_directory_of_that_version(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    import lorashard

    taken = {"lora_name": "mine-v0001", "lora_path": str(tmp_path)}
    with endpoints() as (server, _):
        post(server + "/v1/load_lora_adapter", taken)  # so the script stops when it comes to it
        report = swap(tmp_path, server, "--ep-size", 2, status=1)
    assert "has already been loaded" in report["failure"]
    served, source = tmp_path / "work" / "mine-v0001", tmp_path / "adapter"
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
