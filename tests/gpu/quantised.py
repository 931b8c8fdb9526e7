"""Routed experts in the kinds of weights that users have, written with torch alone.

Block FP8 as DeepSeek has it; compressed-tensors' NVFP4, MXFP4 and int4; GPTQ; AWQ. All but the
routed experts stays bf16: they are what LoRA on experts meets. `out` and `in` are a weight's
features, `g` its groups of input features.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.gpu.reference import LARGEST_E4M3

# Of a weight: the tensors of the checkpoint, by the end of their names, and the weight they mean.
Quantised = tuple[dict[str, Tensor], Tensor]
BLOCK, GROUP, NVFP4_GROUP, MXFP4_GROUP = 128, 128, 16, 32
LARGEST_E2M1 = 6.0
# NVFP4's scale of a whole tensor. One for all, since gate and up must share it.
_NVFP4_SCALE = LARGEST_E4M3 * LARGEST_E2M1 / 0.5
# The columns that AutoAWQ puts in the eight nibbles of an int32, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _fp8_block(weight: Tensor) -> Quantised:
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = (blocks.abs().amax((1, 3)) / LARGEST_E4M3).clamp(min=1e-8)
    each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    stored = (weight / each).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * each


def _e2m1_codes(values: Tensor) -> Tensor:
    """Of the nearest values that four bits have, sign in bit 3; `values` is at most 6."""
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    return torch.bucketize(values.abs(), edges) | (values < 0).long() << 3


def _e2m1_values(codes: Tensor) -> Tensor:
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[codes & 7]
    return torch.where(codes < 8, magnitude, -magnitude)


def _packed_in_bytes(codes: Tensor) -> Tensor:
    """Two codes a byte along `in`, the first one low: `[out, in / 2]`."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _nvfp4(weight: Tensor) -> Quantised:
    groups = weight.unflatten(1, (-1, NVFP4_GROUP))
    scale = groups.abs().amax(2) / LARGEST_E2M1 * _NVFP4_SCALE
    scale = scale.clamp(min=2**-9).to(torch.float8_e4m3fn)
    each = (scale.float() / _NVFP4_SCALE)[..., None]
    codes = _e2m1_codes((groups / each).clamp(-LARGEST_E2M1, LARGEST_E2M1))
    tensors = {
        "weight_packed": _packed_in_bytes(codes.flatten(1)),
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([_NVFP4_SCALE]),
        # Of no effect where the GPU has no FP4: activations stay bf16.
        "input_global_scale": torch.tensor([LARGEST_E4M3 * LARGEST_E2M1 / 16]),
    }
    return tensors, (_e2m1_values(codes) * each).flatten(1)


def _mxfp4(weight: Tensor) -> Quantised:
    groups = weight.unflatten(1, (-1, MXFP4_GROUP))
    exponent = groups.abs().amax(2).clamp(min=1e-20).log2().floor() - 2  # of 6 = 1.5 * 2**2
    each = (2.0**exponent)[..., None]
    codes = _e2m1_codes((groups / each).clamp(-LARGEST_E2M1, LARGEST_E2M1))
    tensors = {
        "weight_packed": _packed_in_bytes(codes.flatten(1)),
        "weight_scale": (exponent + 127).to(torch.uint8),
    }
    return tensors, (_e2m1_values(codes) * each).flatten(1)


def _symmetric_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 that mean -8 to 7 `[out, in]`, scales `[out, g]`, and the weight they mean."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).clamp(min=1e-8).to(torch.bfloat16)
    each = scale.float()[..., None]
    whole = (groups / each).round().clamp(-8, 7)
    return (whole + 8).long().flatten(1), scale, (whole * each).flatten(1)


def _packed_in_int32(codes: Tensor) -> Tensor:
    """Eight codes a number along the last dimension, the first one lowest."""
    nibbles = codes.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    packed = nibbles.sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)


def _int4(weight: Tensor) -> Quantised:
    codes, scale, meant = _symmetric_int4(weight)
    tensors = {
        "weight_packed": _packed_in_int32(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, meant


def _gptq(weight: Tensor) -> Quantised:
    codes, scale, meant = _symmetric_int4(weight)
    num_groups = scale.shape[1]
    tensors = {
        "qweight": _packed_in_int32(codes).t(),
        "scales": scale.t(),
        # GPTQ stores zero points less one.
        "qzeros": _packed_in_int32(torch.full((num_groups, weight.shape[0]), 7)),
        "g_idx": torch.arange(num_groups, dtype=torch.int32).repeat_interleave(GROUP),
    }
    return tensors, meant


def _awq(weight: Tensor) -> Quantised:
    """With zero points other than 8, as AWQ has them."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-8).to(torch.bfloat16)
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = (codes - zero[..., None]) * scale.float()[..., None]

    def pack(values: Tensor) -> Tensor:
        ordered = values.t().unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)]
        return _packed_in_int32(ordered.flatten(1).long())

    tensors = {"qweight": pack(codes.flatten(1)), "qzeros": pack(zero), "scales": scale.t()}
    return tensors, meant.flatten(1)


def _compressed(packing: str, weights: Mapping[str, Any], inputs: Any = None) -> Callable[..., Any]:
    """compressed-tensors' config for a format."""
    fixed = {"num_bits": 4, "symmetric": True, "dynamic": False, "observer": "minmax"}
    return lambda others: {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": others,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": fixed | dict(weights),
                "input_activations": inputs,
                "output_activations": None,
                "format": packing,
            }
        },
    }


def _blocks(weights: list[str]) -> list[str]:
    """What has these weights, since vLLM's own layers (`qkv_proj`) are looked for in such a list."""
    return sorted({w.rpartition(".")[0] if w.endswith("_proj") else w for w in weights})


_FOUR_BIT_FLOAT = {"type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP}
# Kind of weights -> how a weight is written, and the config, given the names of all other weights.
KINDS: Mapping[str, tuple[Callable[[Tensor], Quantised], Callable[[list[str]], Any]]] = {
    "fp8_block": (
        _fp8_block,
        lambda others: {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": others,
        },
    ),
    "nvfp4": (
        _nvfp4,
        _compressed(
            "nvfp4-pack-quantized",
            _FOUR_BIT_FLOAT,
            {**_FOUR_BIT_FLOAT, "num_bits": 4, "symmetric": True, "dynamic": "local"},
        ),
    ),
    "mxfp4": (
        _mxfp4,
        _compressed(
            "mxfp4-pack-quantized",
            {"type": "float", "strategy": "group", "group_size": MXFP4_GROUP},
        ),
    ),
    "int4": (
        _int4,
        _compressed(
            "pack-quantized", {"type": "int", "strategy": "group", "group_size": GROUP}
        ),
    ),
    "gptq": (
        _gptq,
        lambda _: {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": (
        _awq,
        lambda others: {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": _blocks(others),
        },
    ),
}  # fmt: skip


def _is_quantised(weight: str) -> bool:
    return ".experts." in weight and weight.endswith((".gate_proj", ".up_proj", ".down_proj"))


def quantise(kind: str, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round every routed expert in place; returns the checkpoint's tensors for them, by name."""
    write, _ = KINDS[kind]
    tensors: dict[str, Tensor] = {}
    for weight, view in views.items():
        if _is_quantised(weight):
            stored, meant = write(view)
            view.copy_(meant)
            tensors |= {f"{weight}.{end}": tensor for end, tensor in stored.items()}
    return tensors


def save_quantised(kind: str, source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `source` again with these tensors in place of its routed experts' weights."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    state = load_file(source / "model.safetensors")
    # A KeyError where transformers no longer saves one tensor for each expert.
    for weight in {name.rpartition(".")[0] for name in tensors}:
        del state[f"{weight}.weight"]
    others = sorted(
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.dim() == 2 and "embed_tokens" not in name
    )
    new = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state | new, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = KINDS[kind][1](others)
    (target / "config.json").write_text(json.dumps(config, indent=1))
