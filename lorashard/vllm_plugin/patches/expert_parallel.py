"""Expert parallelism for the MoE LoRA layers of vLLM 0.16.0 to 0.20.2, which refuse it.

For one data-parallel rank these releases lack very little. The kernel that the layer's quant
method has made, or that `select_gemm_impl` returns, is already the right one: every rank has all
tokens, the prepare and finalize steps move none of them (0.16.0 fused_moe/all2all_utils.py:99),
the kernel skips experts that `expert_map` places on other ranks, and the layer sums the ranks'
outputs. A step that dispatches tokens, such as MoEPrepareAndFinalizeNaiveEP, would need an all2all
manager that does not exist (0.16.0 device_communicators/base_device_communicator.py:146).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def refuses_expert_parallelism(layer_class: type) -> bool:
    """Whether FusedMoEWithLoRA stops at an assertion; `_ep_check` came with the support (0.21.0)."""
    return not hasattr(layer_class, "_ep_check")


def wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEWithLoRA.__init__: accept expert parallelism, and shard LoRA as the layer is."""

    def __init__(self: Any, base_layer: Any) -> None:  # noqa: N807 - it replaces this method
        parallel = base_layer.moe_parallel_config
        if not parallel.use_ep or parallel.use_all2all_kernels:
            original(self, base_layer)
            return
        # `use_ep` of the layer is a property of this object (0.16.0 fused_moe/layer.py:747); the
        # kernels read the one of their own moe_config.
        base_layer.moe_parallel_config = dataclasses.replace(parallel, use_ep=False)
        try:
            original(self, base_layer)
        finally:
            base_layer.moe_parallel_config = parallel
        # 1 and 0: each expert is whole on its rank. The group's own size would cut it up.
        self.tp_size, self.tp_rank = base_layer.tp_size, base_layer.tp_rank

    return __init__
