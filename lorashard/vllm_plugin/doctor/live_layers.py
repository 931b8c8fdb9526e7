"""The MoE layers of an engine that does not run yet. Pure.

In: what the flags, the model's config.json and the adapter's own tensors say. Out: `LiveExperts`,
as the loader would have them from the running engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from lorashard.adapter.base_model import ModelFacts
from lorashard.shards.placement import linear_placement, round_robin_placement
from lorashard.vllm_options import Strategy
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import AdapterContents, ModuleContents


class NamesOfAdapter:
    """`LayerNames` of an engine whose layers bear the names that the adapter uses."""

    def is_elsewhere(self, module: str) -> bool:  # noqa: ARG002
        """No layer is on another pipeline stage."""
        return False

    def moe_module(self, module: str, live: Collection[str]) -> str | None:
        """The layer of the same name."""
        return module if module in live else None


def expected_layers(
    contents: AdapterContents, flags: EngineFlags, placement: Strategy, model: ModelFacts | None
) -> Iterator[dict[str, LiveExperts]]:
    """The layers that each ep rank would have, one for each experts container of the adapter.

    What `model` does not say (None = not named) is what the adapter's tensors show, which cannot
    make an adapter unfit. So is the wrapper: the 2-D class, which takes whatever the 3-D class
    takes, and needs no more room (`assembly`).
    """
    num_experts = (model and model.num_experts) or contents.num_experts
    place = linear_placement if placement == "linear" else round_robin_placement
    for ep_rank, local_experts in enumerate(place(num_experts, flags.ep_size).ranks):
        yield {
            module.name: _layer(module, num_experts, ep_rank, local_experts, flags, model)
            for module in contents.modules
        }


def _layer(
    module: ModuleContents,
    num_experts: int,
    ep_rank: int,
    local_experts: tuple[int, ...],
    flags: EngineFlags,
    model: ModelFacts | None,
) -> LiveExperts:
    hidden_size, intermediate_size = shown_sizes(module.stacks)
    if model is not None:
        hidden_size = model.hidden_size or hidden_size
        intermediate_size = model.intermediate_size or intermediate_size
    return LiveExperts(
        name=module.name,
        wrapper="2d",
        num_experts=num_experts,
        ep_rank=ep_rank,
        ep_size=flags.ep_size,
        local_experts=local_experts,
        gated=model is None or model.gate_up != "none",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        buffer_intermediate=intermediate_size,
        max_lora_rank=flags.max_lora_rank,
        interleaved=(model or module).gate_up == "interleaved",
        shared_outer=False,
    )


def shown_sizes(stacks: Sequence[ShardStack]) -> tuple[int, int]:
    """(H, I) as a container's tensors show them; 0 for what none of them shows."""
    hidden_size = intermediate_size = 0
    for stack in stacks:
        features = stack.cols if stack.matrix == "lora_A" else stack.rows
        if (stack.projection == "down_proj") == (stack.matrix == "lora_B"):
            hidden_size = features
        else:
            intermediate_size = features // (2 if stack.projection == "gate_up_proj" else 1)
    return hidden_size, intermediate_size
