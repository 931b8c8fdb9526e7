"""The numbers of `inspect` and `plan` are those of the adapter and the plan, as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.inspect.summary import summarize_adapter, summarize_plan, summarize_shards
from lorashard.shards.placement import linear_placement
from lorashard.shards.plan import build_plan
from tests.adapters import LAYOUTS, Spec, build
from tests.strategies import index_of, layout_of

MODULE = "model.layers.0.mlp.experts"


def adapter_summary(spec: Spec) -> dict[str, Any]:
    adapter = build(spec)
    index = index_of(adapter)
    return summarize_adapter(index.config, index.tensors, layout_of(adapter))


def plan_summary(spec: Spec, ep_size: int) -> dict[str, Any]:
    layout = layout_of(build(spec))
    placement = linear_placement(layout.num_experts, ep_size)
    plan = build_plan(layout, placement, None)
    return summarize_plan(layout, placement, plan, max_loras=1, max_lora_rank=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_summary_is_plain_json(layout: str):
    summary = adapter_summary(Spec(layout, extras=True))
    assert json.loads(json.dumps(summary)) == summary


def test_bytes_are_those_of_the_tensors():
    adapter = build(Spec(extras=True))
    summary = adapter_summary(Spec(extras=True))
    total = sum(tensor.nbytes for tensor in adapter.tensors.values())
    replicated = sum(tensor.nbytes for tensor in adapter.replicated.values())
    assert summary["total_bytes"] == total
    assert summary["expert_bytes"] == total - replicated
    assert summary["replicated"]["bytes"] == replicated


def test_replicated_tensors_are_counted_by_kind():
    by_kind = adapter_summary(Spec(extras=True, num_layers=2))["replicated"]["by_kind"]
    assert by_kind == {"gate": 4, "self_attn": 4, "shared_expert": 4}


def test_features_are_in_and_out_of_each_projection():
    features = adapter_summary(Spec("L3"))["modules"][MODULE]["features"]
    assert features == {"gate_up_proj": {"in": 6, "out": 10}, "down_proj": {"in": 5, "out": 6}}


def test_shared_factors_are_named():
    shared = adapter_summary(Spec("L8"))["modules"][MODULE]["shared_factors"]
    assert sorted(shared) == ["down_proj.lora_B", "gate_proj.lora_A", "up_proj.lora_A"]


def test_untrained_experts_and_odd_ranks_are_named():
    module = adapter_summary(Spec(experts=(0, 1), lora_ranks={1: 1}))["modules"][MODULE]
    assert module["absent_experts"] == [2, 3]
    assert module["expert_lora_ranks"]["up_proj"] == {"1": 1, "2": 0, "3": 0}


def test_a_plan_lists_the_experts_of_each_rank():
    ranks = plan_summary(Spec(), 3)["ranks"]
    assert [rank["experts"] for rank in ranks] == [[0, 1], [2], [3]]


def test_a_rank_reads_its_own_file_and_the_replicated_one():
    summary = plan_summary(Spec(extras=True), 2)
    for rank in summary["ranks"]:
        assert rank["bytes_to_read"] == rank["bytes_on_disk"] + summary["replicated_bytes"]


def test_a_plan_s_total_is_the_sum_of_its_files():
    summary = plan_summary(Spec(extras=True), 2)
    on_disk = [rank["bytes_on_disk"] for rank in summary["ranks"]]
    assert summary["total_bytes"] == summary["replicated_bytes"] + sum(on_disk)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_needs_less_host_memory_than_the_whole_adapter(layout: str):
    for rank in plan_summary(Spec(layout), 4)["ranks"]:
        assert rank["host_bytes"] < rank["host_bytes_without"]


def test_a_shard_directory_is_summarised_from_its_manifest(tmp_path: Path):
    source = build(Spec(extras=True)).write(tmp_path / "adapter")
    manifest = split_adapter(source, tmp_path / "out", SplitRequest(ep_size=2))
    summary = summarize_shards(manifest)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["placement"]["ranks"] == [[0, 1], [2, 3]]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes.pop("adapter_model.safetensors") > 0  # the notice has nothing of the adapter
    assert {name: file["bytes"] for name, file in summary["files"].items()} == sizes
