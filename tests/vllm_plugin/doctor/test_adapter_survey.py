"""What a path holds, read as the plugin reads it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.options import LayoutOptions
from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter
from lorashard.vllm_plugin.doctor.findings import SurveyedAdapter
from tests.tiny import (
    MODULE,
    E,
    H,
    I,
    R,
    edit_json,
    per_expert_tensors,
    save_adapter,
    save_config,
    save_fused,
    save_pickled,
)

ALL_FACTS = LayoutOptions(num_experts=E, hidden_size=H, intermediate_size=I)
ATTENTION = {name: t for name, t in per_expert_tensors().items() if ".self_attn." in name}


def survey(
    path: Path, options: LayoutOptions | None = None, *, expert_parallel: bool = True
) -> SurveyedAdapter:
    return survey_adapter(path, options or LayoutOptions(), expert_parallel=expert_parallel)


def test_shards_give_their_placement_sizes_and_contents(tmp_path: Path) -> None:
    split_adapter(save_adapter(tmp_path / "a"), tmp_path / "s", SplitRequest(2, "round_robin"))
    surveyed = survey(tmp_path / "s")
    summary = surveyed.summary
    assert (summary.kind, summary.strategy, summary.ranks) == (
        "shards", "round_robin", ((0, 2), (1, 3)),
    )  # fmt: skip
    files = sorted((tmp_path / "s").glob("ep-*.safetensors"))
    assert summary.rank_bytes == tuple(file.stat().st_size for file in files)
    assert summary.replicated_bytes == (tmp_path / "s/replicated.safetensors").stat().st_size
    assert (summary.lora_rank, summary.num_experts, summary.separate_gate) == (R, E, True)
    assert surveyed.is_shard_directory
    assert surveyed.contents is not None
    assert [module.ranks for module in surveyed.contents.modules] == [((0, 2), (1, 3))]


def test_a_shard_file_of_another_size_is_the_error(tmp_path: Path) -> None:
    split_adapter(save_adapter(tmp_path / "a"), tmp_path / "s", SplitRequest(2))
    file = tmp_path / "s" / "ep-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    surveyed = survey(tmp_path / "s")
    assert surveyed.summary.error is not None
    assert str(file) in surveyed.summary.error
    assert (surveyed.contents, surveyed.needs_model) == (None, False)


@pytest.mark.parametrize(("save", "separate_gate"), [(save_adapter, True), (save_fused, False)])
def test_a_plain_adapter_is_one_file_with_all_experts(
    tmp_path: Path, save: object, separate_gate: bool
) -> None:
    surveyed = survey(save(tmp_path / "a"))  # type: ignore[operator]
    assert (surveyed.summary.num_experts, surveyed.summary.separate_gate) == (E, separate_gate)
    assert surveyed.contents is not None
    (module,) = surveyed.contents.modules
    assert (module.name, module.ranks) == (MODULE, (tuple(range(E)),))


def test_a_pickle_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    assert survey(save_pickled(tmp_path / "a")).summary.num_experts == E


def test_the_largest_rank_counts_patterns_and_experts(tmp_path: Path) -> None:
    plain = save_adapter(tmp_path / "a", rank_pattern={"lm_head": 48})
    assert survey(plain).summary.lora_rank == 48
    assert survey(plain, expert_parallel=False).summary.lora_rank == 48


def test_without_expert_parallelism_the_layout_is_not_read(tmp_path: Path) -> None:
    some = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    surveyed = survey(save_adapter(tmp_path / "a", some), expert_parallel=False)
    assert (surveyed.contents, surveyed.summary.error) == (None, None)
    assert surveyed.summary.num_experts is None


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_an_adapter_without_experts_has_no_contents_and_no_error(
    tmp_path: Path, prefix: str
) -> None:
    dense = {prefix + n.removeprefix("base_model.model."): t for n, t in ATTENTION.items()}
    surveyed = survey(save_adapter(tmp_path / "a", dense))
    assert (surveyed.contents, surveyed.summary.error) == (None, None)
    assert surveyed.summary.lora_rank == R


def test_a_faulty_config_matters_only_where_experts_are_trained(tmp_path: Path) -> None:
    dense, moe = save_adapter(tmp_path / "dense", ATTENTION), save_adapter(tmp_path / "moe")
    for path in (dense, moe):
        edit_json(path / "adapter_config.json", r=0)
    assert survey(dense).summary.error is None
    assert "adapter_config.json" in (survey(moe).summary.error or "")


@pytest.mark.parametrize("options", [LayoutOptions(), replace(ALL_FACTS, num_experts=None)])
def test_an_adapter_that_only_a_model_makes_readable_says_so(
    tmp_path: Path, options: LayoutOptions
) -> None:
    some = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    plain = save_adapter(tmp_path / "a", some)
    surveyed = survey(plain, options)
    assert surveyed.needs_model
    assert "does not say how many there are" in (surveyed.summary.error or "")
    assert survey(plain, ALL_FACTS).contents is not None


def test_a_fault_that_no_model_mends_needs_none(tmp_path: Path) -> None:
    tensors = per_expert_tensors()
    del tensors[f"base_model.model.{MODULE}.0.up_proj.lora_B.weight"]
    surveyed = survey(save_adapter(tmp_path / "a", tensors))
    assert "lora_B" in (surveyed.summary.error or "")
    assert not surveyed.needs_model


def test_missing_files_are_the_error(tmp_path: Path) -> None:
    save_config(tmp_path / "a")
    assert "no adapter_model.safetensors" in (survey(tmp_path / "a").summary.error or "")
    assert "does not exist" in (survey(tmp_path / "nowhere").summary.error or "")
