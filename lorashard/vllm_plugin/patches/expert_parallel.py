"""MoE LoRA layers of vLLM 0.16.0 to 0.20.2, which refuse expert parallelism, made to serve it.

What such a release lacks for one data-parallel rank is little. The kernel that the layer's quant
method made, or that `select_gemm_impl` gives, is the right one as it is: every rank has all
tokens, the prepare and finalize steps move none (0.16.0 fused_moe/all2all_utils.py:99), the
experts skip what `expert_map` puts elsewhere, and the layer sums the ranks' outputs. A dispatching
step such as MoEPrepareAndFinalizeNaiveEP would ask for an all2all manager that does not exist
(0.16.0 device_communicators/base_device_communicator.py:146).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def refuses_expert_parallelism(layer_class: type) -> bool:
    """Whether FusedMoEWithLoRA stops at an assertion; `_ep_check` came with the support (0.21.0)."""
    return not hasattr(layer_class, "_ep_check")


def wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEWithLoRA.__init__: not stopped by expert parallelism, sharded as the layer is."""

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
        # 1 and 0: experts are split, not cut. The group's own size would cut whole experts.
        self.tp_size, self.tp_rank = base_layer.tp_size, base_layer.tp_rank

    return __init__
