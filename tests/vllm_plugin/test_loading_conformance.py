"""The loader inside real vLLM releases, on the CPU: what lands in the LoRA buffers is right.

The releases are those that are prepared (`make test`: the first and the last of the supported
range; `make compat`: one of every minor release). Nothing of vLLM above the layer is replaced:
see harness.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.vllm_release import PLUGIN_RELEASES, answers_of, record

pytestmark = pytest.mark.parametrize("release", PLUGIN_RELEASES)


@cache
def findings(release: str) -> dict[str, Any]:
    """What loading.py finds in a release: one process, because importing vLLM takes seconds."""
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.loading", timeout_s=900)
    record(release, "loading", found)
    return found


def test_every_layout_on_every_rank(release: str) -> None:
    found = findings(release)["all_layouts"]
    assert {name: kind["wrong"] for name, kind in found.items()} == {name: [] for name in found}
    assert {name: kind["checked"] for name, kind in found.items()} == {
        "2d": 1558,
        "3d uneven": 1558,
        "2d non-gated uneven": 410,
        "2d of a real size": 171,
    }
    assert max(kind["largest_difference"] for kind in found.values()) <= 1e-6


@pytest.mark.parametrize(
    "check",
    ["bits_of_stock", "collections_while_loading", "adapters_of_one_form", "partly_trained", "other_dtypes", "only_needed_files", "stays_inert", "without_experts",
     "interleaved_rows", "shared_factors", "model_names", "draft_layers", "fully_sharded", "slots_and_eviction", "experts_classes", "found_by_vllm"],
)  # fmt: skip
def test_nothing_is_wrong(release: str, check: str) -> None:
    assert findings(release)[check] == []


REFUSALS = {
    "truncated": "the file at 2000",
    "swapped": "was written as ep-00001-of-00002.safetensors",
    "missing": "ep-00000-of-00002.safetensors: cannot be read (No such file",
    "config": "not the file that the shards were made from",
    "flipped, header checks": "loaded",
    "flipped": "its bytes are not those that were written",
    "forged placement": "the placement puts 5 experts on rank 0",
    "wrong model": "the adapter has 8 experts",
    "wrong size": "has 16 features",
    "r too large": "r=9 for model.layers.0.mlp.experts, but the engine has room for 8",
    "stray": "extra_proj.lora_A.weight: no module of the model takes this tensor",
    "strict": "split for 4 ranks",
}


def test_what_is_damaged_or_foreign_is_refused_and_the_engine_lives_on(release: str) -> None:
    messages = findings(release)["refused"]
    assert set(messages) == set(REFUSALS)
    # Since 0.32 vLLM itself compares the r of patterns, before the plugin reads the adapter.
    by_vllm = messages["r too large"] == "LoRA rank 9 is greater than max_lora_rank 8."
    assert not by_vllm or tuple(map(int, release.split("."))) >= (0, 32)
    for name, part in REFUSALS.items():
        if name != "r too large" or not by_vllm:
            assert part in messages[name], name


ENGINE_REFUSALS = {
    "eplb": "LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE",
    "data parallel": "LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL",
    "experts without lora": "LORASHARD_RISK_IGNORED_EXPERT_LORA",
    "packing changed": "LORASHARD_RISK_UNKNOWN_VLLM",
    "signature changed": "LORASHARD_RISK_UNKNOWN_VLLM",
}


def test_what_would_be_silently_wrong_is_refused_at_start(release: str) -> None:
    found = findings(release)["engine_refusals"]
    assert set(ENGINE_REFUSALS) - set(found) <= {"experts without lora"}  # a fault since 0.20 only
    for name, (refused, overridden) in found.items():
        assert ENGINE_REFUSALS[name] in refused, name
        # Up to 0.20.2 vLLM itself has no kernel for data-parallel dispatch with LoRA.
        assert overridden == "started" or (
            name == "data parallel" and "EP support" in overridden
        ), name
