"""Build a randomly initialised transformers model of a few hundred kilobytes for any MoE family.

Shapes: E = number of experts, H = HIDDEN, I = EXPERT_INTERMEDIATE. H, I and 2*I are all
different, so that the orientation of a fused parameter can be read off its shape.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers

HIDDEN = 64
EXPERT_INTERMEDIATE = 48

# Every family spells its sizes differently; a config class is given the names it accepts.
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": EXPERT_INTERMEDIATE,
    "moe_intermediate_size": EXPERT_INTERMEDIATE,
    "shared_expert_intermediate_size": EXPERT_INTERMEDIATE,
    "moe_shared_expert_intermediate_size": EXPERT_INTERMEDIATE,
    "shared_intermediate_size": EXPERT_INTERMEDIATE,
    "dense_intermediate_size": EXPERT_INTERMEDIATE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    # Vision and audio towers.
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "deepstack_visual_indexes": [0],
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_model": HIDDEN,
    "output_dim": HIDDEN,
    "downsample_hidden_size": HIDDEN,
}

_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)


def _tiny_fields(
    config_class: type[transformers.PretrainedConfig],
    overrides: Mapping[str, Any],
    num_experts: int,
    num_layers: int,
) -> dict[str, Any]:
    """Constructor arguments of `config_class`; nested mappings of `overrides` go to sub-configs."""
    accepted = set(inspect.signature(config_class.__init__).parameters)
    accepted |= set(config_class.attribute_map)
    sizes = _SIZES | dict.fromkeys(_EXPERT_COUNTS, num_experts) | {"num_hidden_layers": num_layers}
    fields = {name: value for name, value in sizes.items() if name in accepted}
    for name, sub_class in config_class.sub_configs.items():
        if sub_class is transformers.AutoConfig:
            continue  # the family says which config it wants, as an override
        fields[name] = _tiny_fields(sub_class, overrides.get(name, {}), num_experts, num_layers)
    for name, value in overrides.items():
        if not (name in config_class.sub_configs and name in fields):
            fields[name] = value
    return fields


def build_tiny_model(
    class_name: str,
    overrides: Mapping[str, Any],
    *,
    num_experts: int,
    num_layers: int,
    dtype: torch.dtype = torch.float32,
) -> transformers.PreTrainedModel:
    """A randomly initialised `transformers.<class_name>` in evaluation mode."""
    model_class = _find_model_class(class_name)
    config_class = model_class.config_class
    config = config_class(**_tiny_fields(config_class, overrides, num_experts, num_layers))
    return model_class(config).to(dtype).eval()


def _find_model_class(class_name: str) -> type[transformers.PreTrainedModel]:
    """Look up `ClassName`, or `models.module:ClassName` for one transformers does not re-export."""
    module_name, _, attribute = class_name.rpartition(":")
    if not module_name:
        return getattr(transformers, attribute)
    return getattr(importlib.import_module(f"transformers.{module_name}"), attribute)
