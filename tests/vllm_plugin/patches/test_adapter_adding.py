"""An adapter that cannot be activated on one rank is kept on none: two workers, vLLM's own manager."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES, run_in_release

# Rank 1 fails at each fault in turn, once, while adapter 1 is being added; then the next request for
# it comes. Adapter 2 was there before and stays. The same again where two adapters, all that the
# engine keeps, were there before; and where rank 1 alone cannot load.
WORKER = """
import os, sys
from datetime import timedelta
from pathlib import Path
rank, folder, repo = {rank}, Path({folder!r}), {repo!r}
sys.path.insert(0, repo)
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{{folder}}/rendezvous", rank=rank,
                        world_size=2, timeout=timedelta(seconds=60))
from types import SimpleNamespace
from tests.vllm_plugin import patched
from vllm.distributed import parallel_state
parallel_state._TP = SimpleNamespace(world_size=2, cpu_group=dist.new_group([0, 1]))
if rank == 0:
    patched.split_adapter(patched.plain(), folder / "shards", patched.SplitRequest(2))
dist.barrier()

def fails_once(manager, name):
    def failing(*arguments, **options):
        delattr(manager, name)
        raise RuntimeError("CUDA out of memory")
    setattr(manager, name, failing)

answers = {{}}
for fault in ("activate_adapter", "add_adapter", "_create_merged_loras_inplace"):
    engine = patched.engine_of(ep_rank=rank)
    before = patched.load(engine, folder / "shards", 2)
    if rank == 1:
        fails_once(engine._adapter_manager, fault)
    failed = patched.load(engine, folder / "shards", 1)
    kept = sorted(engine.list_adapters())
    dist.barrier()
    after = [patched.load(engine, folder / "shards", number) for number in (1, 2, 1)]
    answers[fault] = [before, failed, kept, after, sorted(engine.list_adapters())]

def loads(engine, path, numbers):
    # Of each load in turn: its outcome, and what is there after it.
    return [[patched.load(engine, path, n), sorted(engine.list_adapters())] for n in numbers]

full = {{}}
for fault in ("remove_oldest_adapter", "activate_adapter", "add_adapter"):
    engine = patched.engine_of(ep_rank=rank)
    before = loads(engine, folder / "shards", (2, 3))
    if rank == 1:
        fails_once(engine._adapter_manager, fault)
    failed = loads(engine, folder / "shards", (1,))
    dist.barrier()
    full[fault] = [before, failed, loads(engine, folder / "shards", (2, 1, 4, 3))]

away, file = folder / "away", folder / "shards2" / "ep-00001-of-00002.safetensors"
if rank == 0:
    patched.split_adapter(patched.plain(), folder / "shards2", patched.SplitRequest(2))
    file.rename(away)
dist.barrier()
engine = patched.engine_of(ep_rank=rank)
missing = loads(engine, folder / "shards2", (1,)) + loads(engine, folder / "shards", (2,))
dist.barrier()
if rank == 0:
    away.rename(file)
dist.barrier()
missing += loads(engine, folder / "shards2", (1, 2))

if rank == 0:
    for number in (0, 1):
        dtype = (None, "float32")[number]
        request = patched.SplitRequest(2, dtype=dtype)
        patched.split_adapter(patched.plain(), folder / f"version{{number}}", request)
        other = patched.adapter_of("L1")
        other.config["lora_alpha"] = 16 + number
        other.write(folder / f"plain{{number}}")
dist.barrier()
engine = patched.engine_of(ep_rank=rank)
differing = []
for kind in ("version", "plain"):
    differing += [patched.load(engine, folder / f"{{kind}}{{rank}}", 3), sorted(engine.list_adapters())]
differing.append(patched.load(engine, folder / "shards", 3))
dist.barrier()
answer([answers, differing, full, missing])
"""


@cache
def workers(release: str, folder: str) -> list[Any]:
    def run(rank: int) -> Any:
        script = WORKER.format(rank=rank, folder=folder, repo=str(REPO))
        return run_in_release(release, script, timeout_s=200)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {release: str(tmp_path_factory.mktemp("workers")) for release in PLUGIN_RELEASES}


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_an_adapter_that_one_rank_cannot_add_is_kept_on_none_and_can_be_asked_for_again(
    release: str, folders: dict[str, str]
) -> None:
    answers = workers(release, folders[release])
    for rank, (found, *_) in enumerate(answers):
        assert len(found) == 3
        for fault, (before, failed, kept, after, at_the_end) in found.items():
            assert before == "loaded", fault
            assert "CUDA out of memory" in failed, fault
            assert failed.startswith("RuntimeError" if rank == 1 else "ValueError: Another rank")
            assert kept == [2], fault
            assert after == ["loaded"] * 3, fault
            assert at_the_end == [1, 2], fault


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_ranks_that_read_different_versions_keep_none(
    release: str, folders: dict[str, str]
) -> None:
    for _, differing, *_ in workers(release, folders[release]):
        shards, kept, plain, still_kept, same = differing
        for outcome in (shards, plain):
            assert outcome.startswith("ValueError: The ranks have read different versions")
        assert (kept, still_kept, same) == ([], [], "loaded")


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_ranks_evict_alike_after_one_has_failed_before_or_after_it_evicted(
    release: str, folders: dict[str, str]
) -> None:
    for rank, (*_, full, _) in enumerate(workers(release, folders[release])):
        assert len(full) == 3
        for fault, (before, [[failed, kept]], after) in full.items():
            assert before == [["loaded", [2]], ["loaded", [2, 3]]], fault
            assert "CUDA out of memory" in failed, fault
            assert failed.startswith("RuntimeError" if rank == 1 else "ValueError: Another rank")
            assert kept == [3], fault
            assert after == [
                ["loaded", [2, 3]], ["loaded", [1, 2]], ["loaded", [1, 4]], ["loaded", [3, 4]],
            ], fault  # fmt: skip


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_a_file_that_one_rank_misses_refuses_the_adapter_until_it_is_back(
    release: str, folders: dict[str, str]
) -> None:
    (*_, other), (*_, own) = workers(release, folders[release])
    reason = "ValueError: LoRA adapter 'a1': rank file ep-00001-of-00002.safetensors: "
    for rank, ((refused, kept), *after) in enumerate((other, own)):
        if rank == 0:
            assert refused.startswith(
                "ValueError: Another rank could not load the adapter (rule ranks-differ): "
            )
        assert refused.removeprefix(
            "ValueError: Another rank could not load the adapter (rule ranks-differ): "
        ).startswith(reason)
        assert "No such file or directory" in refused
        assert kept == []
        assert after == [["loaded", [2]], ["loaded", [1, 2]], ["loaded", [1, 2]]]
