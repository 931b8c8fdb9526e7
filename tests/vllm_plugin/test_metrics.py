"""What workers count reaches the process that serves /metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import REPO

if os.environ.get("LORASHARD_REQUIRE_ALL", "") in ("", "0"):
    pytest.importorskip("prometheus_client")

WORKER = """
import sys
from lorashard.vllm_plugin.metrics import record_failure, record_load
ep_rank = int(sys.argv[1])
record_load(ep_rank, "shards", 0.2, 1000)
record_load(ep_rank, "shards", 3.0, 500)
record_load(ep_rank, "plain adapter", 0.004, 7)
if ep_rank == 1:
    record_failure(ep_rank)
"""


def run_worker(ep_rank: int, code: str = WORKER, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(ep_rank)],
        env={"PYTHONPATH": str(REPO), "PATH": "", **env},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(sample name, labels) -> value, as vLLM's /metrics collects them from two workers' files."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    folder: Path = tmp_path_factory.mktemp("prometheus")
    for ep_rank in (0, 1):
        run_worker(ep_rank, PROMETHEUS_MULTIPROC_DIR=str(folder))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return registry


LOADS = "lorashard_adapter_load"


@pytest.mark.parametrize("ep_rank", ["0", "1"])
def test_seconds_and_bytes_of_every_rank_are_served(served: Any, ep_rank: str) -> None:
    def value(name: str, kind: str, **labels: str) -> float | None:
        found: float | None = served.get_sample_value(
            f"{LOADS}_{name}", {"ep_rank": ep_rank, "kind": kind, **labels}
        )
        return found

    assert value("seconds_count", "shards") == 2
    assert value("seconds_sum", "shards") == pytest.approx(3.2)
    assert value("seconds_bucket", "shards", le="0.25") == 1
    assert value("seconds_bucket", "shards", le="5.0") == 2
    assert value("bytes_total", "shards") == 1500
    assert value("seconds_bucket", "plain adapter", le="0.01") == 1
    assert value("bytes_total", "plain adapter") == 7


def test_failures_are_counted_for_the_rank_that_had_them(served: Any) -> None:
    assert served.get_sample_value(f"{LOADS}_failures_total", {"ep_rank": "1"}) == 1
    assert served.get_sample_value(f"{LOADS}_failures_total", {"ep_rank": "0"}) is None


def test_without_the_directory_they_stay_in_the_worker(tmp_path: Path) -> None:
    tail = "\nfrom prometheus_client import generate_latest\nprint(generate_latest().decode())"
    text = run_worker(0, WORKER + tail)
    assert f'{LOADS}_bytes_total{{ep_rank="0",kind="shards"}} 1500.0' in text


def test_a_worker_that_loads_nothing_does_not_import_prometheus() -> None:
    code = "import sys, lorashard.vllm_plugin.metrics; print('prometheus_client' in sys.modules)"
    assert run_worker(0, code).strip() == "False"
