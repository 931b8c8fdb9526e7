"""PEFT, given the new adapter_config.json, wraps what has tensors, each with its r and scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorashard.adapter.config import parse_config
from lorashard.convert.peft_config import ModuleSetting, write_config
from tests.adapters import Spec, build
from tests.conversions import Work, config_of

BLOCK = "model.layers.{}.mlp"
ATTENTION = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
PARAMETERS = ("gate_up_proj", "down_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# PEFT 0.21 looks for the patterns of parameters among modules, but follows them.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")


class FusedExperts(nn.Module):
    """As transformers 5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 6))
        self.down_proj = nn.Parameter(torch.zeros(2, 6, 4))


def dense(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def model_with(layout: str) -> nn.Module:
    """Two layers of attention, router, shared expert and two routed experts."""
    layers = []
    for _ in range(2):
        experts: nn.Module = FusedExperts()
        if layout == "per_expert":
            one = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
            experts = nn.ModuleList([dense(**one), dense(**one)])
        mlp = dense(gate=(6, 2))
        mlp["experts"] = experts
        mlp["shared_expert"] = dense(up_proj=(6, 4))
        layers.append(nn.ModuleDict({"self_attn": dense(q_proj=(6, 6), k_proj=(6, 6)), "mlp": mlp}))
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(layers)
    return model


def wrapped_by_peft(document: dict[str, Any], layout: str) -> dict[str, tuple[int, float]]:
    """What the real PEFT wraps, and the r and scaling that it gives each."""
    lora = pytest.importorskip("peft.tuners.lora")
    fields = {k: v for k, v in document.items() if k not in ("peft_type", "inference_mode")}
    model = lora.LoraModel(model_with(layout), lora.LoraConfig(**fields), "default")
    wrapped = {}
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer):
            stem = name.removeprefix("model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            full = f"{stem}.{parameter}" if parameter else stem
            wrapped[full] = module.r["default"], module.scaling["default"]
    return wrapped


def experts_of(layout: str, layers: Sequence[int] = (0, 1), **setting: Any) -> list[ModuleSetting]:
    names = PARAMETERS
    if layout == "per_expert":
        names = tuple(f"{expert}.{p}" for expert in range(2) for p in PROJECTIONS)
    lora_rank, alpha = setting.get("lora_rank", 2), setting.get("alpha", 4)
    return [
        ModuleSetting(f"{BLOCK.format(layer)}.experts.{name}", lora_rank, alpha)
        for layer in layers
        for name in names
    ]


def write(
    layout: str, experts: list[ModuleSetting], others: Sequence[str], **source: Any
) -> dict[str, Any]:
    source = {"r": 2, "lora_alpha": 4, "peft_version": "0.21.2", "target_modules": []} | source
    config = parse_config(json.dumps(source).encode(), "source")
    document = write_config(source, config, layout, experts, others)  # type: ignore[arg-type]
    return {field: value for field, value in document.items() if field != "peft_version"}


def settings_of(experts: list[ModuleSetting], **others: tuple[int, float]) -> dict[str, Any]:
    return {e.name: (e.lora_rank, e.alpha / e.lora_rank) for e in experts} | others


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_peft_wraps_exactly_what_has_tensors(layout: str) -> None:
    experts = experts_of(layout, lora_rank=4, alpha=6)
    others = [*ATTENTION, f"{BLOCK.format(1)}.shared_expert.up_proj"]
    wrapped = wrapped_by_peft(write(layout, experts, others, target_modules=["q_proj"]), layout)
    shared = {f"{BLOCK.format(1)}.shared_expert.up_proj": (2, 2.0)}
    if layout == "fused":  # as a parameter, for PEFT would take `up_proj` for the experts'
        shared = {f"{BLOCK.format(1)}.shared_expert.up_proj.weight": (2, 2.0)}
    expected = settings_of(experts, **dict.fromkeys(ATTENTION, (2, 2.0)), **shared)
    assert wrapped == expected


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_experts_that_differ_get_patterns_of_their_own(layout: str) -> None:
    experts = [
        replace(setting, lora_rank=1 + number % 3, alpha=float(1 + number))
        for number, setting in enumerate(experts_of(layout))
    ]
    assert wrapped_by_peft(write(layout, experts, []), layout) == settings_of(experts)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_pattern_that_also_matches_experts_does_not_reach_them(layout: str) -> None:
    patterns = {"rank_pattern": {".*proj": 8}, "alpha_pattern": {"layers.0..*": 24}}
    experts = experts_of(layout, lora_rank=2, alpha=4)
    document = write(layout, experts, ATTENTION, target_modules=["q_proj"], **patterns)
    expected = settings_of(experts, **{ATTENTION[0]: (8, 3.0), ATTENTION[1]: (8, 0.5)})
    assert wrapped_by_peft(document, layout) == expected


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_layers_that_train_different_projections_do_not_get_each_other_s(layout: str) -> None:
    experts = experts_of(layout, layers=[0]) + experts_of(layout, layers=[1])[-1:]
    assert wrapped_by_peft(write(layout, experts, []), layout) == settings_of(experts)


def test_a_router_that_was_a_parameter_keeps_its_r_as_a_parameter() -> None:
    gate = f"{BLOCK.format(0)}.gate"
    experts = experts_of("fused")
    document = write(
        "fused", experts, [gate, BLOCK.format(1) + ".gate"],
        target_parameters=["mlp.gate.weight"], rank_pattern={r"layers\.0\.mlp\.gate\.weight": 1},
    )  # fmt: skip
    wrapped = wrapped_by_peft(document, "fused")
    assert wrapped[f"{gate}.weight"] == (1, 4.0)
    assert wrapped[f"{BLOCK.format(1)}.gate.weight"] == (2, 2.0)


def test_a_module_that_becomes_a_parameter_keeps_its_r() -> None:
    up = f"{BLOCK.format(0)}.shared_expert.up_proj"
    document = write("fused", experts_of("fused"), [up],
                     target_modules=["up_proj"], rank_pattern={"shared_expert.up_proj": 1})  # fmt: skip
    assert wrapped_by_peft(document, "fused")[f"{up}.weight"] == (1, 4.0)


def test_peft_s_own_conversion_of_old_configs_changes_nothing_in_a_fused_one() -> None:
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    lora = pytest.importorskip("peft.tuners.lora")
    others = [*ATTENTION, f"{BLOCK.format(0)}.gate", f"{BLOCK.format(0)}.shared_expert.up_proj"]
    names = ["q_proj", "gate", "up_proj"]
    document = write("fused", experts_of("fused"), others, target_modules=names)
    config = lora.LoraConfig(target_modules=document["target_modules"],
                             target_parameters=document["target_parameters"])  # fmt: skip
    before = set(config.target_modules), set(config.target_parameters)
    model = model_with("fused")
    model.config = SimpleNamespace(model_type="qwen3_moe")
    conversion._convert_peft_config_moe(config, model)
    assert (config.target_modules, config.target_parameters) == before
    assert config.rank_pattern == {}
    # The source's own entries would have been rewritten.
    config = lora.LoraConfig(target_modules=["q_proj", "gate", "up_proj", "gate_proj"])
    conversion._convert_peft_config_moe(config, model)
    assert config.target_modules == {"q_proj"}


def test_rslora_is_kept() -> None:
    experts = experts_of("fused", lora_rank=4, alpha=6)
    document = write("fused", experts, [], use_rslora=True)
    assert set(wrapped_by_peft(document, "fused").values()) == {(4, 6 / math.sqrt(4))}


def test_without_other_modules_the_most_common_setting_needs_no_pattern() -> None:
    experts = experts_of("per_expert", lora_rank=4, alpha=6)
    document = write("per_expert", [*experts[:-1], replace(experts[-1], lora_rank=3)], [])
    assert (document["r"], document["lora_alpha"], document["alpha_pattern"]) == (4, 6, {})
    assert document["rank_pattern"] == {r"model\.layers\.1\.mlp\.experts\.1\.down_proj": 3}


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


def test_what_other_layouts_say_in_the_config_is_dropped(tmp_path: Path) -> None:
    config = {"lora_dropout": 0.1, "init_lora_weights": False, "layers_to_transform": [0]}
    work = Work(tmp_path, build(Spec("L6", extras=True, config=config))).split().convert("fused")
    written = config_of(work)
    assert "lora_B_layout" not in written
    assert written["lora_dropout"] == 0.0
    assert written["init_lora_weights"] is True
    assert written["layers_to_transform"] is None
