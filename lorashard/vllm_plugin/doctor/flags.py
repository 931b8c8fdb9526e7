"""vLLM's options, as far as they matter to expert LoRA. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lorashard.adapter.base_model import ModelFacts
from lorashard.shards.placement import strategy_in_vllm
from lorashard.vllm_options import Strategy


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """vLLM's options, by vLLM's names."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    fully_sharded_loras: bool = False
    expert_placement_strategy: Strategy = "linear"
    max_lora_rank: int = 16
    max_loras: int = 1

    @property
    def ep_size(self) -> int:
        """Number of expert-parallel ranks."""
        ranks = self.tensor_parallel_size * self.data_parallel_size
        return ranks if self.enable_expert_parallel else 1


def effective_placement(
    flags: EngineFlags, model: ModelFacts | None
) -> tuple[Strategy, str | None]:
    """The strategy that vLLM really uses (0.33.0 expert_map_manager.py:116), and a note on why.

    model: None = not named.
    """
    if flags.expert_placement_strategy == "linear" or flags.ep_size == 1:
        return "linear", None
    if flags.enable_eplb:
        return "linear", "With --enable-eplb, vLLM places experts linearly."
    return strategy_in_vllm(flags.expert_placement_strategy, model)
