"""Which LoRA weights are made whole where LoRA is fully sharded; values: loading.fully_sharded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.vllm_plugin.patches.fully_sharded import wrap_create_lora_weights


def made_with(*, use_ep: bool, fully_sharded: bool) -> tuple[Any, Any]:
    """The lora_config that vLLM's own method gets, and the engine's own."""
    parallel = SimpleNamespace(use_ep=use_ep)
    layer = SimpleNamespace(
        base_layer=SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel))
    )
    config = SimpleNamespace(fully_sharded_loras=fully_sharded, max_lora_rank=8)
    calls: list[tuple[Any, ...]] = []
    wrap_create_lora_weights(lambda *args: calls.append(args))(layer, 4, config, "model config")
    ((self, max_loras, given, model_config),) = calls
    assert (self, max_loras, model_config) == (layer, 4, "model config")
    return given, config


def test_experts_that_ep_splits_are_not_sharded_again() -> None:
    given, own = made_with(use_ep=True, fully_sharded=True)
    assert (given.fully_sharded_loras, given.max_lora_rank) == (False, 8)
    assert own.fully_sharded_loras, "the dense layers are made with it"


@pytest.mark.parametrize(("use_ep", "fully_sharded"), [(True, False), (False, True)])
def test_everything_else_is_made_as_configured(use_ep: bool, fully_sharded: bool) -> None:
    given, own = made_with(use_ep=use_ep, fully_sharded=fully_sharded)
    assert given is own
