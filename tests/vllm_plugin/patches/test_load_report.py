"""A load's log lines and metrics, and that a fault in either is never raised."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorashard.vllm_plugin.load.report import LoadReport
from lorashard.vllm_plugin.patches.load_report import report_adding, report_failure, report_load
from tests.tiny import REPO

if os.environ.get("LORASHARD_REQUIRE_ALL", "") in ("", "0"):
    pytest.importorskip("prometheus_client")


REPORT = LoadReport(
    path="/adapters/mine", kind="shards", num_local_experts=4, num_experts=8, num_layers=2,
    num_bytes=3_000_000_000, seconds=1.5, ep_rank=1, ep_size=2, advice=None,
)  # fmt: skip

# The names that a report needs, in a process of its own: prometheus_client reads its variable once.
SCRIPT = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
from tests.vllm_plugin.patches.test_load_report import REPORT
from lorashard.vllm_plugin.patches.load_report import report_failure, report_load
report_load(REPORT, "mine", 3)
report_failure(1)
from prometheus_client import generate_latest
print(generate_latest().decode())
"""


def reported(**env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": str(REPO), "PATH": "", **env},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_load_is_one_line_and_a_failure_is_a_count() -> None:
    done = reported()
    assert done.stderr == (
        "INFO lorashard: adapter 'mine' (id 3) from shards: experts of ep rank 1 of 2 (4 of 8 in "
        "each of 2 layers), 3.000 GB in 1.500 s, 2.0 GB/s\n"
    )
    assert 'lorashard_adapter_load_bytes_total{ep_rank="1",kind="shards"} 3e+09' in done.stdout
    assert 'lorashard_adapter_load_failures_total{ep_rank="1"} 1.0' in done.stdout


def test_metrics_that_cannot_be_written_are_warnings() -> None:
    lines = reported(PROMETHEUS_MULTIPROC_DIR="/nowhere").stderr.splitlines()
    assert lines[0].startswith("INFO lorashard: adapter 'mine' (id 3)")
    assert len(lines) == 3, "one for the load, one for the failure"
    for line in lines[1:]:
        assert line.startswith("WARNING lorashard: the load was not reported (FileNotFoundError: ")
        assert "PROMETHEUS_MULTIPROC_DIR" in line


def test_metrics_are_written_where_the_directory_exists(tmp_path: Path) -> None:
    done = reported(PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert "WARNING" not in done.stderr
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"counter", "histogram"}


def test_what_is_left_to_the_draft_model_is_a_line_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.lorashard"):
        report_load(replace(REPORT, num_left_to_mtp=5), "mine", 3)
    assert "5 modules for multi-token prediction are left out" in caplog.messages[1]


def test_how_long_each_stage_took(caplog: pytest.LogCaptureFixture) -> None:
    stages = {"open": 0.0052, "read": 0.0404, "write into the slot": 0.01}
    with caplog.at_level(logging.INFO, logger="vllm.lorashard"):
        report_load(replace(REPORT, stages=stages), "mine", 3)
    assert caplog.messages[0].endswith("2.0 GB/s (ms: open 5, read 40, write into the slot 10)")


def test_advice_is_a_warning_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.lorashard"):
        report_load(replace(REPORT, advice="run this"), "mine", 3)
    assert caplog.messages == ["lorashard: /adapters/mine: run this"]


def test_a_load_in_no_time_has_a_speed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.lorashard"):
        report_load(replace(REPORT, seconds=0.0, num_bytes=0), "mine", 3)
    (message,) = caplog.messages
    assert message.endswith("0.000 GB in 0.000 s, 0.0 GB/s")


class Broken(logging.Handler):
    """A handler that lets its errors out, unlike those of the standard library."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no space left on device")


def test_logging_that_fails_is_not_raised_either() -> None:
    logger, handler = logging.getLogger("vllm.lorashard"), Broken()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(OSError, match="no space left"):
            logger.info("so it does raise")
        report_load(replace(REPORT, advice="run this"), "mine", 3)
        report_failure(1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_the_log_says_for_how_long_the_engine_waited_and_for_what(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "vllm.lorashard"):
        report_adding("mine", 3, 0.006, (0.001, 0.0005))
    (message,) = caplog.messages
    assert message == (
        "lorashard: adapter 'mine' (id 3): the engine waited 6.00 ms: 1.00 for the other ranks to "
        "have it, 0.50 for their end, 4.50 for what this rank did"
    )
