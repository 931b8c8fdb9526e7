"""An adapter as it is on disk and as factors of the weights that it changes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

LORA_RANK = 8


@dataclass(frozen=True, slots=True)
class Factor:
    """`weight += scaling * lora_b @ lora_a` for one weight, named as `reference.weight_views` does."""

    weight: str
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """What goes to disk, and the same as factors for the reference."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    factors: tuple[Factor, ...]

    def renamed(self, names: Iterable[tuple[str, str]]) -> "Adapter":
        """With each first string of `names` replaced by the second in what goes to disk."""

        def rename(text: str) -> str:
            return reduce(lambda name, pair: name.replace(*pair), names, text)

        config = self.config | {"target_modules": [*map(rename, self.config["target_modules"])]}
        tensors = {rename(name): tensor for name, tensor in self.tensors.items()}
        return Adapter(config, tensors, self.factors)

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            directory / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (directory / "adapter_config.json").write_text(text)


def peft_config(**changes: Any) -> dict[str, Any]:
    """An `adapter_config.json` with the fields that PEFT 0.18 writes."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 2 * LORA_RANK,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "qalora_group_size": 16,
        "r": LORA_RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    } | changes
