"""What vLLM has of an adapter in memory -> experts as an adapter's files would have them.

In: a PEFTHelper, or a LoRAModel that came about without the loader. Out: an adapter's config, and
tensors by the names that PEFT gives them, from which `plain_source` makes this rank's experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.keys import PEFT_PREFIX
from lorashard.errors import LayoutError
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.lora_model import is_ready
from lorashard.vllm_plugin.load.plain_source import names_experts

# The fields of a PEFTHelper that adapter_config.json has, too. The others are vLLM's own.
_FIELDS = (
    "r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora",
    "lora_bias", "init_lora_weights", "alora_invocation_tokens", "layer_replication", "use_bdlora",
    "use_qalora", "rank_pattern", "alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawExperts:
    """The experts of a LoRAModel. names: of the entries that they come from."""

    names: tuple[str, ...]
    tensors: Mapping[str, Any]
    config: bytes


def config_of(peft_helper: Any) -> bytes:
    """The adapter_config.json that says the same as vLLM's reading of one."""
    fields = {name: getattr(peft_helper, name) for name in _FIELDS if hasattr(peft_helper, name)}
    return json.dumps(fields, default=sorted).encode()


def find_raw_experts(model: Any) -> RawExperts | None:
    """The factors of a LoRAModel's experts that are not stacked yet; None if it has none."""
    raw = {
        name: weights
        for name, weights in model.loras.items()
        if not (is_ready(weights) or _is_stacked(weights)) and _is_of_experts(name, weights)
    }
    if not raw:
        return None
    tensors: dict[str, Any] = {}
    for name, weights in raw.items():
        for matrix, tensor in (("lora_A", weights.lora_a), ("lora_B", weights.lora_b)):
            if tensor is not None:
                tensors[f"{PEFT_PREFIX}{name}.{matrix}.weight"] = tensor
    return RawExperts(tuple(raw), tensors, _config_of_weights(raw))


def narrow_stacks(model: Any, layers: Mapping[str, LiveExperts]) -> None:
    """Leave only this rank's experts in stacks of all experts, [num_experts, ...].

    layers: the engine's MoE layers, by name.
    """
    for name, live in layers.items():
        weights = model.loras.get(name)
        if weights is None or not _is_stacked(weights) or is_ready(weights):
            continue
        weights.lora_a = [_narrowed(tensor, live) for tensor in weights.lora_a]
        weights.lora_b = [_narrowed(tensor, live) for tensor in weights.lora_b]


def _narrowed(tensor: Any, live: LiveExperts) -> Any:
    if tensor is None or tensor.shape[0] != live.num_experts:
        return tensor  # this rank's already, or one for all
    return tensor[list(live.local_experts)]


def _is_stacked(weights: Any) -> bool:
    return isinstance(weights.lora_a, list) or isinstance(weights.lora_b, list)


def _is_of_experts(name: str, weights: Any) -> bool:
    tensor = weights.lora_a if weights.lora_a is not None else weights.lora_b
    return tensor is not None and names_experts(f"{PEFT_PREFIX}{name}.lora_A.weight", tensor.dim())


def _config_of_weights(raw: Mapping[str, Any]) -> bytes:
    """A config that gives each module the r and the scaling that vLLM has found for it."""
    first = next(iter(raw.values()))
    lora_rank, scaling = int(first.rank), float(first.scaling)
    others = dict(_other_scalings(raw, lora_rank, scaling))
    config = {
        "r": lora_rank,
        "lora_alpha": scaling * lora_rank,
        "rank_pattern": {name: weights.rank for name, weights in others.items()},
        "alpha_pattern": {name: w.scaling * w.rank for name, w in others.items()},
    }
    return json.dumps(config).encode()


def _other_scalings(
    raw: Mapping[str, Any], lora_rank: int, scaling: float
) -> Iterator[tuple[str, Any]]:
    for name, weights in raw.items():
        if (weights.rank, weights.scaling) == (lora_rank, scaling):
            continue
        if name.endswith((".experts", ".experts.base_layer")):
            # PEFT's patterns know these by the parameter's name, which is not in the LoRAModel.
            raise LayoutError(
                f"{name} has another r or alpha than other experts of the adapter.",
                hint="Load the adapter from a directory.",
            )
        yield name, weights
