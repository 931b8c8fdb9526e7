"""One rank of a real FSDP2 run on the CPU: python fsdp_run.py RANK WORLD FOLDER.

A tiny MoE model with a real PEFT adapter, trained for a step. Saves it by `save_sharded`, and on
rank 0 gathered, by PEFT's own code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lorashard.publish.peft_models import save_sharded


def peft_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, vocab_size=32, num_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=12, max_position_embeddings=64, **changes,
        )
    )  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    return get_peft_model(base, config)


def train_step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def trained_model(world: int) -> Any:
    """Sharded over the ranks, and trained for a step."""
    model = peft_model()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train_step(model)
    return model


def save_gathered(model: Any, folder: Path, rank: int) -> int:
    """The adapter as PEFT would save it, and the base model's config. Returns the number of tensors."""
    whole = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    if rank == 0:
        gathered = folder / "gathered"
        model.peft_config["default"].save_pretrained(gathered)
        model.base_model.model.config.save_pretrained(folder / "base")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in whole.items()},
            gathered / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
    return len(whole)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    model = trained_model(world)
    manifest = save_sharded(model, folder / "sharded", ep_size=3)
    num_tensors = save_gathered(model, folder, rank)
    sharded = sum(hasattr(t, "placements") for t in get_peft_model_state_dict(model).values())
    (folder / f"{rank}.json").write_text(
        json.dumps({"modules": len(manifest.modules), "sharded": sharded, "all": num_tensors})
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
