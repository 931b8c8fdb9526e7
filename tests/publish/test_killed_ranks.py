"""Kill -9 of a rank: a whole directory or none, and the next commit succeeds."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter, verify_shards
from lorashard.publish.removal import remove_shards
from lorashard.shards.directory import claims_to_be_shards
from lorashard.storage.spares import SPARE_NAME
from tests.publish.test_writer import dealt, files_of, gathered

RANKS = ([0, 1], [2, 3], [4, 5])
BARRIERS = 7


def commit_one(path: Path, out: Path, rank: int, barrier: Any, dies_at: int | None) -> None:
    """In a process of its own, which is killed as it comes to that barrier."""
    passed = 0

    def wait() -> None:
        nonlocal passed
        if passed == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1
        barrier.wait(60)

    dealt(path, out, *RANKS, force=True)[rank].commit(wait)
    assert passed == BARRIERS


def commit_all(path: Path, out: Path, kill: int = -1, at: float = BARRIERS) -> None:
    """Commit in processes; `kill` is killed at a barrier, or after some seconds, then the others."""
    context = mp.get_context("fork")
    barrier = context.Barrier(len(RANKS))
    ranks = [
        context.Process(
            target=commit_one,
            args=(path, out, rank, barrier, at if rank == kill and isinstance(at, int) else None),
        )
        for rank in range(len(RANKS))
    ]
    for process in ranks:
        process.start()
    if kill >= 0:
        if isinstance(at, float):
            time.sleep(at)
            ranks[kill].kill()
        ranks[kill].join(60)
        time.sleep(0.2)  # the others go as far as they can
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join(60)
        assert kill >= 0 or process.exitcode == 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A plain adapter, and the files that its shards consist of."""
    folder = tmp_path_factory.mktemp("adapter")
    path = gathered(folder)
    split_adapter(path, folder / "split", SplitRequest(2))
    return path, files_of(folder / "split")


@pytest.mark.parametrize("kill", range(len(RANKS)))
def test_a_rank_that_is_killed_at_a_barrier_leaves_nothing_that_a_server_would_take(
    tmp_path: Path, adapter: tuple[Path, dict[str, bytes]], kill: int
) -> None:
    path, whole = adapter
    for barrier in range(BARRIERS):
        out = tmp_path / f"out{barrier}"
        commit_all(path, out, kill, barrier)
        assert out.exists() == (barrier == BARRIERS - 1)  # rank 0 has finished it by then
        commit_all(path, out)
        assert files_of(out) == whole
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kill", range(len(RANKS)))
def test_the_same_where_the_files_of_an_outdated_version_are_written_to(
    memory_path: Path, adapter: tuple[Path, dict[str, bytes]], kill: int
) -> None:
    path, whole = adapter
    moments = random.Random(kill)
    for at in (*range(BARRIERS), *(moments.uniform(0, 0.15) for _ in range(4))):
        old, out = memory_path / "old", memory_path / "out"
        commit_all(path, old)
        assert remove_shards(old, as_spare=True) is None
        commit_all(path, out, kill, at)
        if isinstance(at, int):
            assert out.exists() == (at == BARRIERS - 1)
        assert not out.exists() or files_of(out) == whole
        for other in memory_path.iterdir():
            assert other == out or not claims_to_be_shards(other)
        commit_all(path, out)
        assert files_of(out) == whole
        verify_shards(out, against=path)
        assert {child.name for child in memory_path.iterdir()} <= {"out", SPARE_NAME}
        shutil.rmtree(out)
        shutil.rmtree(memory_path / SPARE_NAME, ignore_errors=True)


def test_a_rank_that_is_killed_at_any_moment_leaves_a_whole_directory_or_none(
    tmp_path: Path, adapter: tuple[Path, dict[str, bytes]]
) -> None:
    path, whole = adapter
    moments = random.Random(0)
    for attempt in range(8):
        out = tmp_path / f"out{attempt}"
        commit_all(path, out, attempt % len(RANKS), moments.uniform(0, 0.15))
        assert not out.exists() or files_of(out) == whole
        commit_all(path, out)
        assert files_of(out) == whole
        verify_shards(out, against=path)
        assert not list(tmp_path.glob(".*"))
