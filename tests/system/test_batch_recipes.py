"""docs/recipes/batches.md: a list in parts, as Kubernetes, Slurm and Ray run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.system.test_recipes import KUBERNETES, RECIPES, Volumes
from tests.tiny import REPO, contents, per_expert_tensors, run_cli, save_adapter, save_config

PAGE = (RECIPES / "batches.md").read_text()
RAY = Path(os.environ.get("LORASHARD_RAY", REPO / ".venv" / "ray"))
NAMES = [f"run-{number}" for number in range(6)]
BROKEN = "run-4"


def block(marker: str) -> str:
    found = re.search(rf"{marker}\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def save_adapters(folder: Path, names: list[str] = NAMES) -> None:
    """An adapter for each name; one of them has no weights."""
    for seed, name in enumerate(names):
        if name == BROKEN:
            save_config(folder / name)
        else:
            save_adapter(folder / name, per_expert_tensors(seed=seed))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    save_adapters(tmp_path / "adapters")
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{tmp_path}/adapters/{name}\n" for name in NAMES))
    return path


def whole_run(listed: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What one process makes of the list, in `whole`."""
    done = run_cli("split", "--from", listed, "--ep-size", 8, "-o", tmp_path / "whole", "--json")
    assert done.returncode == 3
    documents: list[dict[str, Any]] = json.loads(done.stdout)
    return documents


def in_path() -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": programs, "PYTHONPATH": str(REPO)}


def statuses(documents: list[dict[str, Any]]) -> dict[str, str]:
    return {Path(document["adapter"]).name: document["status"] for document in documents}


# Kubernetes


def job() -> dict[str, Any]:
    (document,) = yaml.safe_load_all(
        re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]
    )
    found: dict[str, Any] = document
    return found


def test_the_job_is_valid_and_its_parts_are_its_completions() -> None:
    kubernetes_validate.validate(job(), KUBERNETES, strict=True)
    spec = job()["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert f'"$JOB_COMPLETION_INDEX/{spec["completions"]}"' in container["args"][0]
    rules = [
        rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert [(rule["containerName"], rule["values"]) for rule in rules] == [("split", [2, 3, 4])]


def test_the_pods_of_the_job_split_the_list_and_one_that_died_goes_on(tmp_path: Path) -> None:
    node = tmp_path / "node"
    save_adapters(node / "adapters")
    (node / "list").mkdir()
    (node / "list" / "list.txt").write_text("".join(f"{node}/adapters/{name}\n" for name in NAMES))
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    codes = []
    for index in range(4):
        # As a pod leaves it that was killed after its first adapter.
        environment = dict(os.environ) | {"JOB_COMPLETION_INDEX": str(index)}
        done = Volumes(node).start(container, environment)
        codes.append(done.returncode)
        if index == 1:
            shutil.rmtree(node / "shards" / "run-5-ep8")
            again = Volumes(node).start(container, environment)
            assert "1 split, 1 already there, 0 failed" in again.stderr
    assert codes == [3, 0, 0, 0]
    parts = [json.loads(p.read_text()) for p in sorted((node / "shards" / "parts").iterdir())]
    joined = statuses([document for part in parts for document in part])
    assert joined == dict.fromkeys(NAMES, "done") | {BROKEN: "failed", "run-1": "skipped"}


# Slurm, and the summary


def test_the_tasks_of_the_array_are_the_whole_run(listed: Path, tmp_path: Path) -> None:
    script, shards = tmp_path / "split.sh", tmp_path / "parts-run"
    script.write_text(block("<!-- slurm -->"))
    (array,) = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script.read_text(), re.MULTILINE)
    indices = range(int(array[0]), int(array[1]) + 1)
    codes = []
    for index in indices:
        environment = in_path() | {
            "LIST": str(listed), "SHARDS": str(shards), "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_ARRAY_TASK_COUNT": str(len(indices)),
        }  # fmt: skip
        done = subprocess.run(["sh", script], env=environment, cwd=tmp_path, check=False)
        codes.append(done.returncode)
    assert codes == [3, 0, 0, 0]
    whole = whole_run(listed, tmp_path)
    parts = [json.loads(path.read_text()) for path in sorted((shards / "parts").iterdir())]
    joined = {document["adapter"]: document for part in parts for document in part}
    text = json.dumps([joined[document["adapter"]] for document in whole])
    assert json.loads(text.replace(str(shards), f"{tmp_path}/whole")) == whole
    shutil.rmtree(shards / "parts")
    assert contents(shards) == contents(tmp_path / "whole")


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_lines_for_jq_join_the_parts(listed: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for index in range(4):
        done = run_cli(
            "split", "--from", listed, "--part", f"{index}/4", "--ep-size", 8, "-o", tmp_path / "out",
            "--json",
        )  # fmt: skip
        (tmp_path / "parts" / f"{index}.json").write_text(done.stdout)
    lines = re.findall(r"^jq .*$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    printed = [
        subprocess.run(
            ["sh", "-ec", line], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for line in lines
    ]
    assert "run-4: " in printed[1]
    assert "no adapter_model.safetensors" in printed[1]
    assert json.loads(printed[2]) == {"done": 5, "failed": 1}


# Ray: a real cluster on this machine, in processes of its own


def on_ray(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python where `ray` can be imported, or skip the test; with LORASHARD_REQUIRE_ALL=1, fail it."""
    if not RAY.exists():
        assert "LORASHARD_REQUIRE_ALL" not in os.environ, f"{RAY} is missing"
        pytest.skip(f"{RAY} is missing")
    paths = os.pathsep.join(map(str, (REPO, RECIPES, RAY)))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return subprocess.run(
        list(map(str, (sys.executable, *command))), env=in_path() | {"PYTHONPATH": paths} | quiet | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_ray_tells_failures_as_one_process_does(listed: Path, tmp_path: Path) -> None:
    script = RECIPES / "ray_batch.py"
    done = on_ray(script, listed, "--ep-size", 8, "--out", tmp_path / "ray", "--parts", 3)
    assert done.returncode == 3, done.stderr
    whole = whole_run(listed, tmp_path)
    summary = json.loads(done.stdout)
    assert statuses(summary) == statuses(whole) == dict.fromkeys(NAMES, "done") | {BROKEN: "failed"}
    told = {document["adapter"]: (document["error"], document["hint"]) for document in summary}
    assert told == {d["adapter"]: (d.get("error"), d.get("hint")) for d in whole}
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")


# Runs the recipe's function on two workers. The first worker that comes to its third adapter is killed.
KILLING = """
import json, os, signal, sys
from pathlib import Path
import ray
import ray_batch

def kill_the_first_at_its_third_adapter():
    import lorashard.split.batch as batch
    split, begun = batch.run_split, []

    def run_split(adapter, *args, **options):
        begun.append(adapter)
        if len(begun) == 3:  # of three, two at once: one is finished
            try:
                os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return split(adapter, *args, **options)

    batch.run_split = run_split

ray.init(num_cpus=2, runtime_env={"worker_process_setup_hook": kill_the_first_at_its_third_adapter})
names = Path(sys.argv[1]).read_text().split()
outcomes = ray_batch.split_on_ray(names, sys.argv[2], 8, 2)
print(json.dumps({outcome.adapter: outcome.status for outcome in outcomes}))
"""


def test_a_part_whose_worker_is_killed_is_finished_by_another(listed: Path, tmp_path: Path) -> None:
    (tmp_path / "killing.py").write_text(KILLING)
    mark = tmp_path / "killed"
    done = on_ray(tmp_path / "killing.py", listed, tmp_path / "ray", MARK=str(mark))
    assert done.returncode == 0, done.stderr
    assert mark.exists(), "a worker was killed"
    found = {
        Path(name).name: status for name, status in json.loads(done.stdout.splitlines()[-1]).items()
    }
    kept = [name for name, status in found.items() if status == "skipped"]
    assert kept, "what the killed worker had finished"
    assert found == dict.fromkeys(NAMES, "done") | {BROKEN: "failed"} | dict.fromkeys(
        kept, "skipped"
    )
    whole_run(listed, tmp_path)
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")
