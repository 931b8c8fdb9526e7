"""Read the weight changes of a live PEFT model, expert by expert.

The numbers come from PEFT's own `get_delta_weight`; this module only names them, so that a test
can compare them with what lorashard reads from the saved file.

Shapes: E = number of experts, H = hidden, I = expert intermediate. A delta is [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from tiny_models import EXPERT_INTERMEDIATE

_PER_EXPERT_MODULE = re.compile(
    r"(?P<container>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)$"
)
_PROJECTION_ALIASES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# 3-D parameters, by "<module leaf>.<parameter>" or "<parameter>"; the container of the former is
# named `experts` beside the leaf.
_FUSED_PARAMETERS = {
    "gate_up_proj": "gate_up",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "input_linear.weight": "gate_up",
    "output_linear.weight": "down_proj",
    "fc1.weight": "gate_up",
    "fc2.weight": "down_proj",
}
# Where a [out, in] delta has the expert width. The other side is the hidden size of the model, or
# a latent size in families that project the tokens down before the experts.
_WIDTH_AXIS = {
    "gate_up": (0, 2 * EXPERT_INTERMEDIATE),
    "up_proj": (0, EXPERT_INTERMEDIATE),
    "down_proj": (1, EXPERT_INTERMEDIATE),
}


def collect_deltas(
    model: PeftModel, adapter_name: str, *, interleaved: bool
) -> dict[str, torch.Tensor]:
    """Deltas of every adapted layer, float32.

    Keys: `experts|<container>|<expert>|<projection>` and `module|<name>`, names without PEFT's
    prefix. interleaved: gate is rows 0::2 of a fused gate_up delta (gpt-oss), not its first half.
    """
    deltas: dict[str, torch.Tensor] = {}
    for name, layer in _adapted_layers(model, adapter_name):
        delta = layer.get_delta_weight(adapter_name).detach().float()
        if isinstance(layer, ParamWrapper) and delta.dim() == 3:
            deltas |= _fused_deltas(f"{name}.{layer.parameter_name}", delta, interleaved)
        elif isinstance(layer, ParamWrapper) and layer.parameter_name != "weight":
            deltas[f"module|{name}.{layer.parameter_name}"] = delta
        elif match := _PER_EXPERT_MODULE.match(name):
            projection = _PROJECTION_ALIASES.get(match["projection"], match["projection"])
            deltas[f"experts|{match['container']}|{match['expert']}|{projection}"] = delta
        else:
            deltas[f"module|{name}"] = delta
    return {key: delta.contiguous().clone() for key, delta in deltas.items()}


def _adapted_layers(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    for full_name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            # PEFT nests one wrapper per targeted parameter of the same module.
            name = re.sub(r"(\.base_layer)+$", "", full_name)
            yield name.removeprefix("base_model.model."), layer


def _fused_deltas(
    parameter_name: str, delta: torch.Tensor, interleaved: bool
) -> dict[str, torch.Tensor]:
    """delta: [E, out, in] or [E, in, out]."""
    container, leaf, attribute = parameter_name.rsplit(".", 2)
    if attribute == "weight":
        kind = _FUSED_PARAMETERS[f"{leaf}.weight"]
        # Granite keeps its two tensors directly in the MoE block, Aria in `experts`.
        container = container if container.endswith(".experts") else f"{container}.experts"
    else:
        kind = _FUSED_PARAMETERS[attribute]
        container = f"{container}.{leaf}"
    delta = _orient(parameter_name, delta, *_WIDTH_AXIS[kind])
    projections = {kind: delta}
    if kind == "gate_up":
        gate, up = (delta[:, 0::2], delta[:, 1::2]) if interleaved else delta.chunk(2, dim=1)
        projections = {"gate_proj": gate, "up_proj": up}
    return {
        f"experts|{container}|{expert}|{projection}": stacked[expert]
        for projection, stacked in projections.items()
        for expert in range(stacked.shape[0])
    }


def _orient(name: str, delta: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """[E, out, in] from a delta stored in the orientation of its parameter."""
    shape = delta.shape[1:]
    if (shape[axis] == width) == (shape[1 - axis] == width):
        raise ValueError(f"{name}: cannot tell in from out in an expert delta of {tuple(shape)}")
    return delta if shape[axis] == width else delta.transpose(1, 2)
