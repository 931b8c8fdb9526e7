"""--fully-sharded-loras with expert parallelism: dense layers are sharded, experts stay whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


def wrap_create_lora_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEWithLoRA.create_lora_weights: experts split by EP are not sharded a second time.

    Fully sharded LoRA sums the shrunk activations over the tensor-parallel group. Under expert
    parallelism the ranks of that group hold different experts, whose activations do not add up.
    """

    def create_lora_weights(
        self: Any, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> Any:
        parallel = self.base_layer.moe_config.moe_parallel_config
        if parallel.use_ep and lora_config.fully_sharded_loras:
            lora_config = copy.copy(lora_config)
            lora_config.fully_sharded_loras = False
        return original(self, max_loras, lora_config, model_config)

    return create_lora_weights
