"""VLLM's configuration and modules -> EngineFacts."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lorashard.vllm_plugin.guards import EngineFacts


def config_facts(vllm_config: Any) -> EngineFacts:
    """What the configuration says before a model is loaded."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    count = getattr(model, "get_num_experts", None)
    sizes = ("tensor_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    ranks = math.prod(int(getattr(parallel, name, 1)) for name in sizes)
    return EngineFacts(
        expert_parallel=bool(parallel.enable_expert_parallel) and ranks > 1,
        data_parallel_size=int(getattr(parallel, "data_parallel_size", 1)),
        eplb=bool(getattr(parallel, "enable_eplb", False)),
        num_experts=int(count()) if count is not None else None,
    )


def module_facts(
    vllm_config: Any, wrappers: Mapping[str, Any], contract_breaks: Sequence[str]
) -> EngineFacts:
    """The same with what the loaded model's MoE layers add."""
    kernels = (getattr(wrapper, "_moe_kernel", None) for wrapper in wrappers.values())
    experts = [
        e for e in (getattr(kernel, "fused_experts", None) for kernel in kernels) if e is not None
    ]
    classes = dict.fromkeys(map(type, experts))  # one for all layers, mostly: source is read once
    return dataclasses.replace(
        config_facts(vllm_config),
        num_experts=None if wrappers else 0,  # vLLM does not know the count of every model
        contract_breaks=tuple(contract_breaks),
        experts_class=type(experts[-1]).__name__ if experts else None,
        reads_lora=all(map(reads_lora_context, classes)),
        lora_sees_fp8=any(map(_lora_sees_quantized, experts)),
        leaves_rows=any(map(_leaves_rows, classes)),
    )


def reads_lora_context(experts_class: type) -> bool:
    """Whether `apply` of an experts class looks at its LoRA context.

    A class can inherit `supports_lora() -> True` and override `apply` without it: TritonWNA16Experts
    (0.20.2 fused_moe.py:2189, 0.33.0 experts/triton_moe.py:656).
    """
    for owner in experts_class.__mro__:
        method = vars(owner).get("apply")
        if method is None:
            continue
        try:
            source = inspect.getsource(method)
        except (OSError, TypeError):
            return True  # no source to read: nothing known against it
        if "lora" in source:
            return True
        if "super().apply(" not in source:
            return False
    return True


def _lora_sees_quantized(experts: Any) -> bool:
    """0.20.0 to 0.23: LoRA gets the activations after they were quantised (vLLM issue 42007)."""
    mixin = next((c for c in type(experts).__mro__ if c.__name__ == "LoRAExpertsMixin"), None)
    if mixin is None:
        return False
    context = getattr(sys.modules[mixin.__module__], "MoELoRAContext", None)
    fields = {field.name for field in dataclasses.fields(context)} if context else set()
    if not fields or "original_hidden_states" in fields:
        return False
    return getattr(getattr(experts, "quant_config", None), "quant_dtype", None) is not None


def _leaves_rows(experts_class: type) -> bool:
    """Up to 0.24 the unfused gpt-oss experts sum with `moe_sum`, not `masked_moe_sum`."""
    unfused = next(
        (c for c in experts_class.__mro__ if c.__name__ == "UnfusedOAITritonExperts"), None
    )
    return unfused is not None and not hasattr(sys.modules[unfused.__module__], "masked_moe_sum")
