"""How many buffers are prepared at start, on hosts and in containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard.vllm_plugin.load import host_memory
from lorashard.vllm_plugin.load.host_memory import affordable_buffers, available_bytes

GIB = 2**30


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 64 GiB available and one worker; cgroup files are put into the directory."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       131072000 kB\nMemFree:         1000 kB\n"
        f"MemAvailable:   {64 * 2**20} kB\nHugePages_Total:       0\n"
    )
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def limit(cgroup: Path, most: object, used: object) -> None:
    (cgroup / "memory.max").write_text(f"{most}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")


def test_without_a_cgroup_the_host_s_available_memory_counts(host: Path) -> None:
    assert available_bytes() == 64 * GIB


def test_a_container_s_limit_counts_less_what_is_used(host: Path) -> None:
    limit(host, 24 * GIB, 8 * GIB)
    assert available_bytes() == 16 * GIB


def test_a_limit_above_the_host_s_memory_changes_nothing(host: Path) -> None:
    limit(host, 500 * GIB, GIB)
    assert available_bytes() == 64 * GIB


def test_a_cgroup_without_a_limit_changes_nothing(host: Path) -> None:
    limit(host, "max", GIB)
    assert available_bytes() == 64 * GIB


def test_a_container_over_its_limit_has_nothing_left(host: Path) -> None:
    limit(host, 2 * GIB, 3 * GIB)
    assert available_bytes() == 0
    assert affordable_buffers(3, GIB) == 0


def test_one_eighth_of_what_is_available_is_spent(host: Path) -> None:
    assert affordable_buffers(100, GIB) == 8
    assert affordable_buffers(100, 3 * GIB) == 2
    assert affordable_buffers(100, 9 * GIB) == 0


def test_no_more_is_prepared_than_wished(host: Path) -> None:
    assert affordable_buffers(3, GIB) == 3
    assert affordable_buffers(0, GIB) == 0


def test_all_workers_of_the_host_share_that_part(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert affordable_buffers(100, GIB) == 2


@pytest.mark.parametrize("told", [None, "", "0"])
def test_a_worker_that_is_told_no_number_is_alone(
    host: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    if told is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert affordable_buffers(100, GIB) == 8


def test_an_engine_without_lora_buffers_divides_by_nothing(host: Path) -> None:
    assert affordable_buffers(3, 0) == 3


def test_this_host_says_what_it_has() -> None:
    assert available_bytes() >= 0
