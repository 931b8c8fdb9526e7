"""What vLLM has of an adapter in memory, as an adapter's files would have it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorashard.adapter.config import parse_config
from lorashard.errors import LayoutError
from lorashard.vllm_plugin.load.in_memory import config_of, find_raw_experts, narrow_stacks
from lorashard.vllm_plugin.load.lora_model import mark_ready

EXPERTS = "model.layers.0.mlp.experts"


def weights(lora_rank: int = 2, scaling: float = 2.0, **changed: Any) -> Any:
    fields = {
        "rank": lora_rank, "scaling": scaling, "lora_a": torch.zeros(lora_rank, 4),
        "lora_b": torch.zeros(3, lora_rank),
    }  # fmt: skip
    return SimpleNamespace(**fields | changed)


def model(**loras: Any) -> Any:
    return SimpleNamespace(id=1, loras=loras)


def test_a_config_keeps_what_the_helper_says_and_nothing_of_vllm() -> None:
    helper = SimpleNamespace(
        r=8, lora_alpha=16, target_modules={"v_proj", "q_proj"}, use_rslora=True,
        rank_pattern={"q_proj": 4}, vllm_lora_scaling_factor=3.0,
    )  # fmt: skip
    raw = config_of(helper)
    assert json.loads(raw)["target_modules"] == ["q_proj", "v_proj"]
    assert "vllm" not in raw.decode()
    config = parse_config(raw, "here")
    assert (config.lora_rank, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert config.rank_of("model.q_proj") == 4


def test_experts_get_the_names_that_peft_gives_them() -> None:
    dense, expert = weights(), weights()
    name = f"{EXPERTS}.3.gate_proj"
    raw = find_raw_experts(model(**{name: expert, "model.layers.0.self_attn.q_proj": dense}))
    assert raw is not None
    assert raw.names == (name,)
    assert raw.tensors == {
        f"base_model.model.{name}.lora_A.weight": expert.lora_a,
        f"base_model.model.{name}.lora_B.weight": expert.lora_b,
    }


@pytest.mark.parametrize(
    "loras",
    [
        {},
        {"model.layers.0.self_attn.q_proj": weights()},
        {EXPERTS: weights(lora_a=[torch.zeros(1)], lora_b=[torch.zeros(1)])},
    ],
)
def test_what_is_no_expert_or_stacked_already_is_left(loras: dict[str, Any]) -> None:
    assert find_raw_experts(model(**loras)) is None


def test_what_is_ready_is_left() -> None:
    ready = weights(lora_a=[torch.zeros(5, 1, 1)], lora_b=[torch.zeros(5, 1, 1)])
    dummy = weights()
    mark_ready(ready)
    mark_ready(dummy)
    made = model(**{EXPERTS: ready, f"{EXPERTS}.base_layer": dummy})
    live = SimpleNamespace(num_experts=5, local_experts=(4, 1))
    narrow_stacks(made, {EXPERTS: live})  # type: ignore[dict-item]
    assert len(ready.lora_a[0]) == 5
    assert find_raw_experts(made) is None


def test_each_expert_keeps_its_own_r_and_scaling() -> None:
    loras = {f"{EXPERTS}.{e}.up_proj": weights(2 + e, 2.0 / (1 + e)) for e in range(3)}
    raw = find_raw_experts(model(**loras))
    assert raw is not None
    config = parse_config(raw.config, "here")
    for name, each in loras.items():
        assert config.rank_of(name) == each.rank
        assert config.scaling_of(name, each.rank) == pytest.approx(each.scaling)


def test_fused_experts_with_two_scalings_are_refused() -> None:
    loras = {f"{EXPERTS}.base_layer": weights(), EXPERTS: weights(scaling=1.0)}
    with pytest.raises(LayoutError, match="another r or alpha"):
        find_raw_experts(model(**loras))


def test_stacks_of_all_experts_are_narrowed_to_those_of_the_rank() -> None:
    live = SimpleNamespace(num_experts=5, local_experts=(4, 1))
    whole = torch.arange(5.0).view(5, 1, 1)
    shared, own = torch.ones(1, 1, 1), torch.zeros(2, 1, 1)
    stacked = weights(lora_a=[whole, shared, None], lora_b=[whole, own, None])
    narrow_stacks(model(**{EXPERTS: stacked}), {EXPERTS: live})  # type: ignore[dict-item]
    assert stacked.lora_a[0].flatten().tolist() == [4.0, 1.0]
    assert stacked.lora_b[0].flatten().tolist() == [4.0, 1.0]
    assert stacked.lora_a[1:] == [shared, None]
    assert stacked.lora_b[1:] == [own, None]
