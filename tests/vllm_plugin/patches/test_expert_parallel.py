"""The check of older releases that is passed, and nothing else of theirs; layers: layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.vllm_plugin.patches.expert_parallel import wrap_init
from tests.vllm_plugin.patched_answers import answers, number
from tests.vllm_release import PLUGIN_RELEASES


@dataclass(frozen=True)
class Parallel:
    """vLLM's FusedMoEParallelConfig, which is a dataclass too."""

    use_ep: bool
    use_all2all_kernels: bool = False
    ep_rank: int = 3


def layer_of(parallel: Parallel) -> Any:
    return SimpleNamespace(moe_parallel_config=parallel, tp_size=1, tp_rank=0)


def old_init(self: Any, base_layer: Any) -> None:
    """0.16.0 to 0.20.2: an assertion, then the sizes of the tensor-parallel group."""
    assert not base_layer.moe_parallel_config.use_ep, "EP support for Fused MoE LoRA is not"
    self.seen = base_layer.moe_parallel_config
    self.tp_size, self.tp_rank = 4, 2


def wrapped(parallel: Parallel) -> tuple[Any, Any]:
    lora, layer = SimpleNamespace(), layer_of(parallel)
    wrap_init(old_init)(lora, layer)
    return lora, layer


def test_the_assertion_is_passed_and_experts_are_whole_on_their_rank() -> None:
    parallel = Parallel(use_ep=True)
    lora, layer = wrapped(parallel)
    assert lora.seen == Parallel(use_ep=False), "all else is as it was"
    assert (lora.tp_size, lora.tp_rank) == (1, 0)
    assert layer.moe_parallel_config is parallel


def test_without_expert_parallelism_vllm_decides_all() -> None:
    parallel = Parallel(use_ep=False)
    lora, layer = wrapped(parallel)
    assert lora.seen is layer.moe_parallel_config is parallel
    assert (lora.tp_size, lora.tp_rank) == (4, 2)


def test_where_tokens_are_dispatched_vllm_s_assertion_stays() -> None:
    with pytest.raises(AssertionError, match="EP support"):
        wrapped(Parallel(use_ep=True, use_all2all_kernels=True))


def test_the_layer_is_left_as_it_was_when_vllm_fails() -> None:
    def failing(self: Any, base_layer: Any) -> None:
        raise RuntimeError("no kernel")

    parallel = Parallel(use_ep=True)
    layer = layer_of(parallel)
    with pytest.raises(RuntimeError, match="no kernel"):
        wrap_init(failing)(SimpleNamespace(), layer)
    assert layer.moe_parallel_config is parallel


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_releases_to_0_20_2_need_it(release: str) -> None:
    assert answers(release)["needed"]["expert_parallel"] == (number(release) <= (0, 20, 2))
