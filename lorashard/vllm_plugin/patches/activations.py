"""LoRA on FP8 experts in vLLM 0.20.0 to 0.23: it gets the activations, not their FP8 codes.

In these releases the modular kernel quantises the layer's input before the experts run, and the
experts pass on to LoRA what they got: codes without their scale (vLLM issue 42007). Since 0.24.0
the input is part of the LoRA context; these patches put it there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = "vllm.model_executor.layers.fused_moe"
_FIELD = "original_hidden_states"


def gives_lora_quantised_input(_owner: type) -> bool:
    """Whether this vLLM has a LoRA context that does not carry the input."""
    for name in (f"{_PACKAGE}.lora_context", f"{_PACKAGE}.experts.lora_context"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # nor does its package exist
            continue
        if spec is not None and spec.origin is not None:
            return _FIELD not in Path(spec.origin).read_text(encoding="utf-8")
    return False


def wrap_modular_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEModularMethod.apply, which every layer with LoRA calls: remember the input."""

    def apply(
        self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        context = getattr(self.moe_kernel.fused_experts, "_lora_context", None)
        config = self.moe_quant_config
        if context is None or config is None or config.quant_dtype is None:
            return original(self, layer, x, topk_weights, topk_ids, *args, **kwargs)
        # As the kernel does before it quantises (prepare_finalize/no_dp_ep.py:68).
        weighted = layer.apply_router_weight_on_input
        setattr(context, _FIELD, x * topk_weights.to(x.dtype) if weighted else x)
        try:
            return original(self, layer, x, topk_weights, topk_ids, *args, **kwargs)
        finally:
            delattr(context, _FIELD)

    return apply


def wrap_apply_w13_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAExpertsMixin.apply_w13_lora: the remembered input in place of the quantised one."""

    def apply_w13_lora(self: Any, lora_context: Any, *, x: Any, **kwargs: Any) -> Any:
        activations = getattr(lora_context, _FIELD, None)
        if (
            activations is not None
            and activations.dtype != x.dtype
            and activations.shape[0] == x.shape[0]
        ):
            x = activations
        return original(self, lora_context, x=x, **kwargs)

    return apply_w13_lora
