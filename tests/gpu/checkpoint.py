"""What transformers does not write of a checkpoint: FP8 weights, Qwen3-VL's layout, MTP, a tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.gpu.reference import LARGEST_E4M3, VOCABULARY


def _is_quantised(weight: str) -> bool:
    leaf = weight.rsplit(".", 1)[-1]
    return leaf.endswith("_proj") and leaf != "gate_up_proj"


def quantise_views(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round every projection to FP8 in place; returns the scale of each output channel `[out, 1]`."""
    scales: dict[str, Tensor] = {}
    for weight, view in views.items():
        # Gate and up are quantised one by one; the view of both would do it a second time.
        if _is_quantised(weight):
            exact = (view.abs().amax(dim=1, keepdim=True) / LARGEST_E4M3).clamp(min=1e-8)
            scale = exact.to(torch.bfloat16)
            view.copy_((view / scale.float()).to(torch.float8_e4m3fn).float() * scale.float())
            scales[weight] = scale
    return scales


def save_fp8(source: Path, target: Path, scales: Mapping[str, Tensor]) -> None:
    """Write `source` again with the projections in compressed-tensors' FP8."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    state = load_file(source / "model.safetensors")
    for weight, scale in scales.items():
        # KeyError here: transformers no longer saves one tensor for each expert.
        exact = state[f"{weight}.weight"].float() / scale.float()
        state[f"{weight}.weight"] = exact.to(torch.float8_e4m3fn)
        state[f"{weight}.weight_scale"] = scale
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _compressed_tensors(config["num_hidden_layers"])
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _compressed_tensors(num_layers: int) -> dict[str, Any]:
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(num_layers))],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits
                | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def transpose_experts(directory: Path, hidden_size: int) -> None:
    """Store experts `[E, in, out]`, as Qwen3-VL-MoE is published and vLLM reads it.

    transformers 5 turns them when it reads such a checkpoint, and not every release turns them back.
    """
    path = directory / "model.safetensors"
    state = load_file(path)
    for name, tensor in state.items():
        inputs = {"gate_up_proj": 1, "down_proj": 2}.get(name.rpartition(".")[2])
        if inputs and tensor.dim() == 3 and tensor.shape[inputs] != hidden_size:
            state[name] = tensor.transpose(1, 2).contiguous()
    save_file(state, path, metadata={"format": "pt"})


def add_mtp_layer(directory: Path) -> None:
    """Give a GLM-4-MoE a layer that predicts one more token, made of its last one, as vLLM reads it."""
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    config, state = json.loads(config_path.read_text()), load_file(weights_path)
    number, hidden_size = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{number - 1}.", f"model.layers.{number}."
    layer = {
        name.replace(last, new): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(last)
    }
    ones = torch.ones(hidden_size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(hidden_size, 2 * hidden_size, generator=generator) * 0.05
    layer |= {
        f"{new}enorm.weight": ones,
        f"{new}hnorm.weight": ones.clone(),
        f"{new}eh_proj.weight": both.to(torch.bfloat16),
        f"{new}shared_head.norm.weight": ones.clone(),
        f"{new}shared_head.head.weight": state["lm_head.weight"].clone(),
        f"{new}embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
    }
    save_file(state | layer, weights_path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=1))


def save_tokenizer(directory: Path, vocabulary: int = VOCABULARY) -> None:
    """One word for each token id, so that a server can start; requests are token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0"
    ).save_pretrained(directory)
