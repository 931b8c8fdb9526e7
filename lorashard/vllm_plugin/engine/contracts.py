"""What the plugin relies on in vLLM beyond the patched methods, checked before it loads anything.

In: vLLM's LoRA manager and its class LoRAModel. Out: a sentence for each difference. Nothing of
vLLM is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorashard.vllm_plugin.engine.live import moe_wrappers


def contract_breaks(
    manager: Any, stock_model: Any, broken_patches: Sequence[str]
) -> tuple[str, ...]:
    """Sentences on how this vLLM differs from what the plugin relies on; none if all is well.

    stock_model: vLLM's class LoRAModel. broken_patches: a sentence for each patch that is not in
    place. Each check relies on those before it, so only the first that fails is reported. The last
    one gives a tagged adapter to the manager's own packing and checks that it comes back unchanged.
    """
    breaks = list(broken_patches)
    for check in (_signatures, _attributes, _packing):
        if not breaks:
            breaks.extend(check(manager, stock_model))
    return tuple(breaks)


def _signatures(_manager: Any, stock_model: Any) -> Iterator[str]:
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.utils import parse_fine_tuned_lora_name

    expected: Sequence[tuple[Callable[..., Any], tuple[str, ...]]] = (
        (stock_model.from_lora_tensors, ("lora_model_id", "tensors", "peft_helper", "device", "dtype")),
        (stock_model.from_local_checkpoint, ("lora_dir", "expected_lora_modules", "peft_helper")),
        (stock_model.__init__, ("self", "lora_model_id", "rank", "loras")),
        (
            PackedLoRALayerWeights.__init__,
            ("self", "module_name", "rank", "lora_alphas", "lora_a", "lora_b", "scaling"),
        ),
        (parse_fine_tuned_lora_name, ("name", "weights_mapper")),
    )  # fmt: skip
    for function, names in expected:
        parameters = tuple(inspect.signature(function).parameters)
        if parameters[: len(names)] != names:
            yield f"{function.__qualname__} has the parameters {', '.join(parameters)}"


def _attributes(manager: Any, _stock_model: Any) -> Iterator[str]:
    for name in ("model", "modules", "packed_modules", "lora_config", "device"):
        if not hasattr(manager, name):
            yield f"{type(manager).__name__} has no {name}"
    for module, wrapper in moe_wrappers(manager).items():
        for name in ("base_layer", "tp_size", "w13_lora_a_stacked", "w13_lora_b_stacked"):
            if not hasattr(wrapper, name):
                yield f"{module} ({type(wrapper).__name__}) has no {name}"
        if not hasattr(wrapper.base_layer, "moe_config"):
            yield f"{module}'s layer has no moe_config"
        elif wrapper.base_layer.moe_config.moe_parallel_config.use_ep and wrapper.tp_size != 1:
            yield f"{module} is sharded by tensor parallelism and by experts at once"
        return  # one layer stands for all


def _packing(manager: Any, stock_model: Any) -> Iterator[str]:
    """Packed experts must pass through `_create_merged_loras_inplace` unchanged."""
    import torch
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    for name, wrapper in moe_wrappers(manager).items():
        slots = int(wrapper.w13_lora_b_stacked[0].shape[1])
        parts = 2 if type(wrapper).__name__ == "FusedMoE3DWithLoRA" else 3
        dtype = manager.lora_config.lora_dtype

        values = (torch.arange(slots * parts * 2).view(parts, slots, 1, 2) % 61).to(dtype)

        weights = PackedLoRALayerWeights(
            name, 1, [1] * parts, list(values + 1), list(values + 90), scaling=[1] * parts
        )
        model = stock_model(1, 1, {name: weights})
        merge = getattr(manager, "_create_merged_loras_inplace", None)
        if merge is None:
            yield f"{type(manager).__name__} has no _create_merged_loras_inplace"
            return
        merge(model)
        merged = model.loras.get(name)
        unchanged = merged is not None and all(
            len(tensors) == parts and all(map(torch.equal, tensors, values + shift))
            for tensors, shift in ((merged.lora_a, 1), (merged.lora_b, 90))
        )
        if not unchanged:
            yield f"{type(manager).__name__} changes expert weights that are packed already"
        return
