"""A vLLM worker extension: other maps for EPLB, what it has done, and how long it takes.

Called by `LLM.collective_rpc`, on all ranks at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from lorashard.vllm_plugin.engine.live import moe_wrappers
from lorashard.vllm_plugin.patches.row_tables import moving_stacks


class RandomMaps:
    """A policy of EPLB: nearly every expert moves. The same maps on all ranks, call by call."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def rebalance_experts(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each expert at least once."""
        num_layers, num_experts = weight.shape
        rows = []
        for _ in range(num_layers):
            experts = list(range(num_experts))
            experts += self._random.choices(experts, k=num_replicas - num_experts)
            self._random.shuffle(experts)
            rows.append(experts)
        return torch.tensor(rows)


class Rebalancing:
    """Methods of the worker."""

    model_runner: Any

    def _state(self) -> Any:
        return self.model_runner.eplb_state

    def use_random_maps(self, seed: int) -> None:
        """From the next rearrangement on."""
        self._state().policy = RandomMaps(seed)

    def hold_experts(self, interval: int) -> None:
        """From now on a rearrangement after as many steps; one that is on its way still arrives."""
        state = self._state()
        state.expert_rearrangement_step_interval = interval
        state.expert_rearrangement_step = 0

    def expert_maps(self) -> list[Any]:
        """The logical expert in each physical one's place, by layer."""
        (state,) = self._state().model_states.values()
        return state.physical_to_logical_map.tolist()  # type: ignore[no-any-return]

    def bytes_a_slot(self) -> list[int]:
        """Of one place of an expert, in all layers: base weights, and one LoRA slot; 0 without LoRA."""
        (state,) = self._state().model_states.values()
        weights = [tensor for layer in state.model.expert_weights for tensor in layer]
        base = sum(tensor[0].numel() * tensor.element_size() for tensor in weights)
        manager = getattr(self.model_runner, "lora_manager", None)
        wrappers = moe_wrappers(manager._adapter_manager).values() if manager else ()
        stacks = [stack for wrapper in wrappers for stack in moving_stacks(wrapper)]
        return [base, sum(stack[0, 0].numel() * stack.element_size() for stack in stacks)]

    def rearrange(self, seed: int, repeats: int) -> list[float]:
        """Seconds of each synchronous rearrangement, maps at random."""
        state = self._state()
        state.policy = RandomMaps(seed)
        seconds = []
        for _ in range(repeats):
            torch.distributed.barrier()
            torch.cuda.synchronize()
            began = time.perf_counter()
            state.rearrange()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return seconds

    def rearrange_with(
        self, seed: int, repeats: int, counts: Sequence[int]
    ) -> dict[str, list[float]]:
        """The same with so many adapters in their slots, one after the other, of those in host memory.

        Each time one more rearrangement comes first, which is not counted: it is slower after adapters
        were put into their slots, and only the others come right after another. Without LoRA, counts
        can only be 0.
        """
        lora = getattr(self.model_runner, "lora_manager", None)
        manager = lora._adapter_manager if lora else None
        numbers = sorted(manager.list_adapters()) if manager else []
        seconds = {}
        for count in counts:
            for number in numbers:
                manager.deactivate_adapter(number)
            for number in numbers[:count]:
                manager.activate_adapter(number)
            seconds[str(count)] = self.rearrange(seed + count, 1 + repeats)[1:]
        return seconds
