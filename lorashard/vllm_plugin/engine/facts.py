"""VLLM's configuration and loaded modules -> `EngineFacts`, which `guards.py` decides on."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lorashard.vllm_plugin.engine.guards import (
    ALL2ALL,
    ELASTIC_ENGINES,
    ELASTIC_EPLB,
    EPLB_TOO,
    MICROBATCHES,
    NIXL_EPLB,
    OLD_DATA_PARALLEL,
    OLD_EPLB,
    PIPELINES,
    TENSOR_PARALLEL,
    TOO_FEW_SLOTS,
    EngineFacts,
    unknown_data_parallel,
    unknown_eplb,
)
from lorashard.vllm_plugin.engine.live import routed_experts

_ALL2ALL = "allgather_reducescatter"
_TRITON_EXPERTS = "model_executor/layers/fused_moe/experts/triton_moe.py"
_RUNNER = "model_executor/layers/fused_moe/runner/moe_runner.py"


def config_facts(vllm_config: Any) -> EngineFacts:
    """What the configuration alone says, before a model is loaded."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    count = getattr(model, "get_num_experts", None)
    sizes = ("tensor_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    ranks = math.prod(int(getattr(parallel, name, 1)) for name in sizes)
    eplb = bool(getattr(parallel, "enable_eplb", False))
    num_engines = int(getattr(parallel, "data_parallel_size", 1))
    return EngineFacts(
        expert_parallel=bool(parallel.enable_expert_parallel) and ranks > 1,
        data_parallel_size=num_engines,
        eplb=eplb,
        eplb_obstacle=_eplb_obstacle(parallel) if eplb else None,
        data_parallel_obstacle=_data_parallel_obstacle(vllm_config) if num_engines > 1 else None,
        num_experts=int(count()) if count is not None else None,
    )


def _data_parallel_obstacle(vllm_config: Any) -> str | None:
    """Why engines could not agree on LoRA slots in this configuration; None if they can."""
    parallel, lora = vllm_config.parallel_config, getattr(vllm_config, "lora_config", None)

    def above_one(*names: str) -> bool:
        return any(int(getattr(parallel, name, 1)) > 1 for name in names)

    obstacles = {
        TENSOR_PARALLEL: above_one("tensor_parallel_size"),
        PIPELINES: above_one("pipeline_parallel_size", "prefill_context_parallel_size"),
        # Since 0.24 other engines' tokens come unquantised, as LoRA needs them.
        OLD_DATA_PARALLEL: not _source_has(_TRITON_EXPERTS, "lora_unquantized_hidden_states"),
        ALL2ALL: getattr(parallel, "all2all_backend", _ALL2ALL) != _ALL2ALL,
        MICROBATCHES: bool(getattr(parallel, "enable_dbo", False)) or above_one("ubatch_size"),
        ELASTIC_ENGINES: bool(getattr(parallel, "enable_elastic_ep", False)),
        EPLB_TOO: bool(getattr(parallel, "enable_eplb", False)),
        TOO_FEW_SLOTS: lora is not None and int(lora.max_loras) < parallel.data_parallel_size,
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _eplb_obstacle(parallel: Any) -> str | None:
    """Why LoRA could not follow its experts in this configuration; None if it can."""
    if getattr(parallel, "enable_elastic_ep", False):
        return ELASTIC_EPLB
    # Since 0.24 it asks the class that LoRA wraps for what it moves.
    if not _source_has(_RUNNER, "def get_expert_weights("):
        return OLD_EPLB
    eplb = getattr(parallel, "eplb_config", None)
    return NIXL_EPLB if getattr(eplb, "communicator", None) == "nixl" else None


@cache
def _source_has(file: str, text: str) -> bool:
    """Whether a file of vLLM's source has a text; True where there is no vLLM to look at.

    Not by importing it, which takes the API server a second.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return True  # nothing is known of it
    source = Path(spec.origin).parent / file
    return source.is_file() and text in source.read_text()


def has_lora_and_ep(vllm_config: Any) -> bool:
    """Whether an engine serves LoRA under expert parallelism."""
    return vllm_config.lora_config is not None and config_facts(vllm_config).expert_parallel


def module_facts(
    vllm_config: Any,
    wrappers: Mapping[str, Any],
    contract_breaks: Sequence[str],
    eplb_breaks: Sequence[str] = (),
    data_parallel_breaks: Sequence[str] = (),
) -> EngineFacts:
    """The same, and what the loaded model's MoE layers add.

    wrappers: the MoE LoRA wrappers by name. contract_breaks: from `contracts.py`. eplb_breaks: a
    sentence for each patch that EPLB needs and that is not in place; data_parallel_breaks: the same.
    """
    facts = config_facts(vllm_config)
    experts = [e for e in map(_experts_object, wrappers.values()) if e is not None]
    # Mostly one class for all layers; its source is read once.
    classes = dict.fromkeys(map(type, experts))
    return dataclasses.replace(
        facts,
        eplb_obstacle=facts.eplb_obstacle or (unknown_eplb(eplb_breaks) if eplb_breaks else None),
        data_parallel_obstacle=facts.data_parallel_obstacle
        or (unknown_data_parallel(data_parallel_breaks) if data_parallel_breaks else None),
        num_experts=None if wrappers else 0,  # vLLM cannot count the experts of every model
        contract_breaks=tuple(contract_breaks),
        experts_class=type(experts[-1]).__name__ if experts else None,
        reads_lora=all(map(reads_lora_context, classes)),
        leaves_rows=any(map(_leaves_rows, classes)),
        weighs_inputs=any(map(_weighs_inputs, wrappers.values())),
        rearranged_for=next(filter(None, map(_rearranged_for, wrappers.values())), None),
    )


def _experts_object(wrapper: Any) -> Any:
    """The object that computes a layer's experts, under the name that each release has for it."""
    method = getattr(wrapper.base_layer, "quant_method", None)
    kernel = (
        getattr(wrapper, "_moe_kernel", None)  # from 0.21.0
        or getattr(method, "moe_kernel", None)  # 0.17 to 0.20
        or getattr(method, "moe_mk", None)  # 0.16
    )
    return getattr(getattr(kernel, "impl", kernel), "fused_experts", None)


def _rearranged_for(wrapper: Any) -> str | None:
    """The kernel whose weight layout an unquantised layer has, if LoRA uses another kernel.

    Up to 0.19 LoRA always makes a Triton kernel, whichever the method chose (0.19.1
    oracle/unquantized.py); with expert parallelism VLLM_USE_FLASHINFER_MOE_FP16 chooses one that
    swaps gate and up.
    """
    method = getattr(wrapper.base_layer, "quant_method", None)
    method = getattr(method, "old_quant_method", method)
    backend = getattr(method, "unquantized_backend", None)
    if backend is None or getattr(method, "supports_internal_mk", False):
        return None
    return None if backend.name == "TRITON" else str(backend.value)


def _weighs_inputs(wrapper: Any) -> bool:
    """Whether the router's weight is on an expert's input."""
    return bool(getattr(routed_experts(wrapper), "apply_router_weight_on_input", False))


def reads_lora_context(experts_class: type) -> bool:
    """Whether `apply` of an experts class looks at its LoRA context.

    Up to 0.19 there is no context: LoRA wraps the steps of any class that it accepts. Later a class
    can inherit `supports_lora() -> True` and override `apply` without it: TritonWNA16Experts
    (0.20.2 fused_moe.py:2189, 0.33.0 experts/triton_moe.py:656).
    """
    if not hasattr(experts_class, "supports_lora"):
        return True
    for owner in experts_class.__mro__:
        method = vars(owner).get("apply")
        if method is None:
            continue
        try:
            source = inspect.getsource(method)
        except (OSError, TypeError):
            return True  # no source to read, so there is nothing to hold against it
        if "lora" in source:
            return True
        if "super().apply(" not in source:
            return False
    return True


def _leaves_rows(experts_class: type) -> bool:
    """Whether the class sums rows of remote experts that nothing has written.

    Up to 0.24 the unfused gpt-oss experts sum with `moe_sum`, not `masked_moe_sum`.
    """
    unfused = next(
        (c for c in experts_class.__mro__ if c.__name__ == "UnfusedOAITritonExperts"), None
    )
    return unfused is not None and not hasattr(sys.modules[unfused.__module__], "masked_moe_sum")
