"""The model and the adapters of `load_time`: GLM-4.5-Air's shapes, 8 MoE layers, r = 32.

    python -m tests.gpu.load_adapters WORK [--scale 0.1] [--form per_expert]

Values come from the GPU where there is one; 4 GB on disk.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.bench.trainer_ranks import ATTENTION as ATTENTION_SHAPES
from tests.bench.trainer_ranks import HIDDEN, INTERMEDIATE, LORA_RANK, NUM_EXPERTS
from tests.gpu.adapter import peft_config
from tests.gpu.loras import ATTENTION

FORMATS = ("per_expert", "fused")
ADAPTERS_PER_FORMAT = 2
NUM_LAYERS, VOCABULARY = 9, 2048


def adapter_directory(work: Path, form: str, number: int, *, shards: bool) -> Path:
    """Where an adapter lies, plain or split."""
    return work / f"{form}{number}{'.shards' if shards else ''}"


def write_model_config(work: Path, num_experts: int) -> None:
    """Only config.json: the weights are dummies."""
    from transformers import Glm4MoeConfig

    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2048,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        n_routed_experts=num_experts,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        max_position_embeddings=8192,
        num_nextn_predict_layers=0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.architectures = ["Glm4MoeForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(work / "model")


def make_adapter(form: str, seed: int, num_experts: int, device: str) -> dict[str, Tensor]:
    """The tensors of one adapter."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        return (values * 0.02).cpu()

    tensors: dict[str, Tensor] = {}
    for layer in range(NUM_LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        for name, (out_features, in_features) in ATTENTION_SHAPES.items():
            stem = f"{prefix}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = draw(LORA_RANK, in_features)
            tensors[f"{stem}.lora_B.weight"] = draw(out_features, LORA_RANK)
        experts = f"{prefix}.mlp.experts"
        if layer == 0:
            continue
        if form == "fused":
            all_ranks = num_experts * LORA_RANK
            tensors[f"{experts}.base_layer.lora_A.weight"] = draw(all_ranks, HIDDEN)
            tensors[f"{experts}.base_layer.lora_B.weight"] = draw(2 * INTERMEDIATE, all_ranks)
            tensors[f"{experts}.lora_A.weight"] = draw(all_ranks, INTERMEDIATE)
            tensors[f"{experts}.lora_B.weight"] = draw(HIDDEN, all_ranks)
            continue
        for name in ("gate_proj", "up_proj", "down_proj"):
            down = name == "down_proj"
            in_features, out_features = (INTERMEDIATE, HIDDEN) if down else (HIDDEN, INTERMEDIATE)
            lora_a = draw(num_experts, LORA_RANK, in_features)
            lora_b = draw(num_experts, out_features, LORA_RANK)
            for expert in range(num_experts):
                stem = f"{experts}.{expert}.{name}"
                # safetensors refuses tensors that share memory.
                tensors[f"{stem}.lora_A.weight"] = lora_a[expert].clone()
                tensors[f"{stem}.lora_B.weight"] = lora_b[expert].clone()
    return tensors


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.load_adapters")
    parser.add_argument("work", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the experts")
    parser.add_argument("--form", choices=FORMATS, help="only this one")
    args = parser.parse_args()
    num_experts = int(NUM_EXPERTS * args.scale)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    write_model_config(args.work, num_experts)
    experts = ["gate_proj", "up_proj", "down_proj"]
    for form in [args.form] if args.form else FORMATS:
        changes = {"target_modules": [*ATTENTION, *(experts if form == "per_expert" else [])]}
        if form == "fused":
            changes["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft_config(r=LORA_RANK, lora_alpha=2 * LORA_RANK, **changes)
        for number in range(ADAPTERS_PER_FORMAT):
            directory = adapter_directory(args.work, form, number, shards=False)
            if (directory / "adapter_config.json").exists():
                continue
            directory.mkdir(exist_ok=True)
            tensors = make_adapter(form, number, num_experts, device)
            save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
            (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
            print(directory, len(tensors), "tensors", flush=True)


if __name__ == "__main__":
    _main()
