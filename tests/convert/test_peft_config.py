"""PEFT, given the new adapter_config.json, wraps what has tensors, each with its r and scaling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.adapters import Spec, build
from tests.conversions import Work, assert_same_deltas, config_of, deltas
from tests.tiny import contents


def test_experts_get_one_pattern_where_they_are_alike(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L1", extras=True))).split().convert("fused")
    config = config_of(work)
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"experts\.gate_up_proj": 4}
    assert config["alpha_pattern"] == {r"experts\.gate_up_proj": 8}
    # PEFT >= 0.19 takes `gate` and `up_proj` among target_modules for the routed experts.
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["target_parameters"] == [
        "gate.weight", "model.layers.0.mlp.shared_expert.up_proj.weight",
        "experts.gate_up_proj", "experts.down_proj",
    ]  # fmt: skip


def test_patterns_for_other_modules_stay_theirs(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {r".*\.experts\.1\..*": 3, r".*_proj": 2},
        "alpha_pattern": {r".*\.experts\.1\..*": 6, r"q_proj": 7, r".*_proj": 5},
    }
    spec = Spec("L1", lora_ranks={1: 3}, extras=True, config=patterns, fill="random")
    work = Work(tmp_path, build(spec)).split().convert("per_expert")
    assert contents(work.out) == contents(work.source)
    spec = replace(spec, layout="L2", lora_ranks={}, config={"alpha_pattern": {r".*_proj": 5}})
    work = Work(tmp_path / "fused", build(spec)).split().convert("per_expert")
    config = config_of(work)
    assert list(config["alpha_pattern"].items()) == [
        (r"experts\.\d+\.gate_proj", 5), (r"experts\.\d+\.up_proj", 5),
        (r"experts\.\d+\.down_proj", 5), (r".*_proj", 5),
    ]  # fmt: skip
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))


def test_what_other_layouts_say_in_the_config_is_dropped(tmp_path: Path) -> None:
    config = {"lora_dropout": 0.1, "init_lora_weights": False, "layers_to_transform": [0]}
    work = Work(tmp_path, build(Spec("L6", extras=True, config=config))).split().convert("fused")
    written = config_of(work)
    assert "lora_B_layout" not in written
    assert written["lora_dropout"] == 0.0
    assert written["init_lora_weights"] is True
    assert written["layers_to_transform"] is None
