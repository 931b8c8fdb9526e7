"""Write the adapter that transformers 4 would have made, for PEFT to convert on loading.

Shapes: E = number of experts, H = hidden, I = expert intermediate, r = LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn


def write_per_expert_adapter(
    base_model: nn.Module, config: peft.LoraConfig, adapter_dir: Path
) -> None:
    """Write random per-expert factors for every module that `config.target_modules` names.

    base_model: has fused experts, of [E, 2I, H] and [E, H, I].
    """
    targets = set(config.target_modules or ())
    tensors: dict[str, torch.Tensor] = {}
    for name, out_features, in_features in _projections(base_model):
        if name.rsplit(".", 1)[-1] in targets:
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(config.r, in_features)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, config.r)
    config.save_pretrained(adapter_dir)
    save_file(tensors, adapter_dir / "adapter_model.safetensors")


def _projections(base_model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, out and in features of the nn.Linear modules that transformers 4 would have."""
    for name, module in base_model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.out_features, module.in_features
        elif name.endswith(".experts"):
            num_experts, hidden, intermediate = module.down_proj.shape
            for expert in range(num_experts):
                yield f"{name}.{expert}.gate_proj", intermediate, hidden
                yield f"{name}.{expert}.up_proj", intermediate, hidden
                yield f"{name}.{expert}.down_proj", hidden, intermediate
