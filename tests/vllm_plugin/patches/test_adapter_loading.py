"""Loading through vLLM's own `_load_adapter`, inside real vLLM releases on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_plugin.patched_answers import answers, number
from tests.vllm_release import PLUGIN_RELEASES, run_in_release

RISK = "LORASHARD_RISK_UNKNOWN_VLLM"

every_release = pytest.mark.parametrize("release", PLUGIN_RELEASES)


@every_release
def test_vllm_s_own_class_is_back_after_every_load_however_it_ended(release: str) -> None:
    found = answers(release)["class_after_loads"]
    assert len(found) == 8
    assert {case: is_back for case, (_, is_back) in found.items()} == dict.fromkeys(found, True)
    for case, (outcome, _) in found.items():
        if case.startswith(("shards", "plain")):
            assert outcome == "loaded", case
        else:
            assert "Error: " in outcome, case


@every_release
@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_damaged_directory_is_the_kind_of_error_that_vllm_raises_and_says_why(
    release: str, ep_size: int
) -> None:
    outcome, _ = answers(release)["class_after_loads"][f"damaged, ep_size {ep_size}"]
    assert outcome.startswith("ValueError: LoRA adapter 'a3': rank file ep-00000-of-00002")
    assert "No such file or directory" in outcome


@every_release
def test_vllm_sees_the_stand_in_and_through_it_the_class(release: str) -> None:
    assert answers(release)["stand_in"] == {
        "seen": ["LoraModelStandIn"], "other attributes": True, "no attribute": False,
    }  # fmt: skip


@every_release
def test_without_expert_parallelism_the_first_shard_directory_makes_the_loader(
    release: str,
) -> None:
    plain, shards, plain_again = answers(release)["loader_of_an_engine_without_ep"]
    assert plain == ["loaded", False, False]
    assert shards == ["loaded", True, True]
    assert plain_again == ["loaded", True, False], "plain adapters are vLLM's own business"


@every_release
def test_an_unknown_vllm_loads_no_shards_but_plain_adapters_without_ep(release: str) -> None:
    found = answers(release)["contracts_without_ep"]
    for case, reason in (
        ("refused", "changes expert weights that are packed already"),
        ("refused too", "has the parameters self, name, lora_a, lora_b"),
    ):
        assert found[case].startswith("ValueError: lorashard: This vLLM differs from what")
        assert reason in found[case]
        assert f"{RISK}=1" in found[case]
    assert (found["has loader"], found["plain"]) == (False, "loaded")


@every_release
def test_the_variable_accepts_an_unknown_vllm_and_the_log_says_so(release: str) -> None:
    found = answers(release)["contracts_without_ep"]
    assert found["accepted"] == "loaded"
    assert f"not refused because {RISK} is set: This vLLM differs" in found["warnings"][0]
    assert "a patch is not in place" in found["warnings"][0]


@every_release
def test_an_r_of_0_that_vllm_refuses_is_explained_with_a_way_out_that_works(release: str) -> None:
    found = answers(release)["configurations_refused_by_vllm"]
    for ep_size in ("1", "2"):
        for form in ("converted", "split again"):
            assert found[ep_size][form] == "loaded", (ep_size, form)
    if number(release) < (0, 32):
        assert found["2"]["rank 0"] == found["1"]["shards"] == found["2"]["shards"] == "loaded"
        return
    refused = (
        "ValueError: LoRA rank for `model.layers.0.mlp.experts.5.down_proj` in `rank_pattern` must "
        "be a positive integer, got 0."
    )
    explained = (
        "\n  lorashard: modules with r=0 are not trained. Run {}: the configuration that convert "
        "writes names no r=0. Serve what it writes, or split that."
    )
    of_shards = refused + explained.format("`lorashard convert`")
    assert found["1"] == found["1"] | {"rank 0": refused, "shards": of_shards}
    of_plain = refused + explained.format("`lorashard split`, then `lorashard convert`")
    assert found["2"] == found["2"] | {"rank 0": of_plain, "shards": of_shards}


@every_release
def test_what_vllm_says_of_an_unreadable_configuration_is_kept_and_explained(release: str) -> None:
    found = answers(release)["configurations_refused_by_vllm"]["2"]
    said, _, explained = found["mlx"].partition("\n  lorashard: ")
    assert said.startswith("ValueError: Missing required configuration fields: {")
    assert explained == (
        "PATH: MLX's own format (adapters.safetensors) is not supported.\n"
        "  lorashard reads PEFT's format; convert the adapter to that first."
    )
    assert found["not JSON"] == (
        "ValueError: TypeError: list indices must be integers or slices, not str\n"
        "  lorashard: PATH/adapter_config.json: not a JSON object.\n  Save the adapter again."
    )


@every_release
def test_vllm_s_text_is_alone_where_lorashard_knows_no_more(release: str) -> None:
    found = answers(release)["configurations_refused_by_vllm"]
    for ep_size in ("1", "2"):
        assert found[ep_size]["no targets"] == (
            "ValueError: Missing required configuration fields: {'target_modules'}"
        )
    assert "lorashard" not in found["1"]["mlx"] + found["1"]["not JSON"]


# Two workers of one engine, each a process of its own. On rank 0 the directory of the metrics is
# missing, so prometheus_client raises at each value that is counted.
WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
rank, folder, repo = {rank}, Path({folder!r}), {repo!r}
if rank == 0:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/nowhere"
sys.path.insert(0, repo)
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{{folder}}/rendezvous", rank=rank,
                        world_size=2, timeout=timedelta(seconds=60))
from types import SimpleNamespace
from tests.vllm_plugin import patched
from vllm.distributed import parallel_state
engine = patched.engine_of(ep_rank=rank)
parallel_state._TP = SimpleNamespace(world_size=2, cpu_group=dist.new_group([0, 1]))
damaged = folder / "damaged"
if rank == 0:
    patched.split_adapter(patched.plain(), folder / "shards", patched.SplitRequest(2))
    patched.split_adapter(patched.plain(), damaged, patched.SplitRequest(2))
    (damaged / "ep-00000-of-00002.safetensors").write_bytes(b"short")
dist.barrier()
with patched.logged() as messages:
    outcomes = [patched.load(engine, folder / "shards") for _ in range(2)]
    kept = sorted(engine.list_adapters())
    outcomes.append(patched.load(engine, damaged, 2))
dist.barrier()
answer([outcomes, kept, sorted(engine.list_adapters()), messages])
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both workers answer: outcomes of three loads, adapters after two and three, warnings."""
    folder = tmp_path_factory.mktemp("workers")

    def run(rank: int) -> Any:
        script = WORKER.format(rank=rank, folder=str(folder), repo=str(REPO))
        return run_in_release(PLUGIN_RELEASES[0], script, timeout_s=200)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


def test_metrics_that_cannot_be_written_on_one_rank_take_the_adapter_from_none(
    workers: list[Any],
) -> None:
    for outcomes, kept, _, _ in workers:
        assert outcomes[:2] == ["loaded", "loaded"]
        assert kept == [1]


def test_what_could_not_be_counted_is_logged_where_it_happened(workers: list[Any]) -> None:
    (*_, with_fault), (*_, without_fault) = workers
    assert [m for m in without_fault if "not reported" in m] == []
    missing = [m for m in with_fault if "the load was not reported (FileNotFoundError" in m]
    assert len(missing) == 2, "the load and the failure; what is there already is not loaded again"
    assert "PROMETHEUS_MULTIPROC_DIR" in missing[0]


def test_a_failure_that_cannot_be_counted_keeps_its_reason_and_fails_everywhere(
    workers: list[Any],
) -> None:
    (own, _, left_0, _), (other, _, left_1, _) = workers
    assert own[2].startswith("ValueError: LoRA adapter 'a2': rank file ep-00000-of-00002")
    assert other[2].startswith(
        "ValueError: Another rank could not load the adapter (rule ranks-differ): ValueError"
    )
    assert "rank file ep-00000-of-00002" in other[2]
    assert left_0 == left_1 == [1]
