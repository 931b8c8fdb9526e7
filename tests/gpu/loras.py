"""The adapters of the acceptance: files as PEFT writes them, and what each does to which weight.

Shape letters: `E` experts, `r` LoRA rank, `H` hidden size, `I` expert intermediate size.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LORA_RANK = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


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


Views = Mapping[str, Tensor]


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


class _Draw:
    """Random factors for one adapter; `strength` is the standard deviation of lora_B."""

    def __init__(self, seed: int, strength: float, dtype: torch.dtype = torch.bfloat16) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._strength = strength
        self._dtype = dtype

    def pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`lora_A [r, in]` and `lora_B [out, r]` for a weight `[out, in]`."""
        out_features, in_features = weight.shape
        lora_a = torch.randn(LORA_RANK, in_features, generator=self._generator)
        lora_b = torch.randn(out_features, LORA_RANK, generator=self._generator)
        return (lora_a / in_features**0.5).to(self._dtype), (lora_b * self._strength).to(
            self._dtype
        )


def _leaf(weight: str) -> str:
    return weight.rsplit(".", 1)[-1]


def _is_attention(weight: str) -> bool:
    return _leaf(weight) in ATTENTION


def _is_split_expert(weight: str) -> bool:
    """Weights that a per-expert adapter trains; a view of gate and up together is not one."""
    return ".experts." in weight and _leaf(weight) in {"gate_proj", "up_proj", "down_proj"}


def _from_pairs(
    views: Views,
    config: dict[str, Any],
    draw: _Draw,
    wanted: Callable[[str], bool],
    scaling: Callable[[str], float],
) -> Adapter:
    """An adapter with one pair of tensors for each wanted weight."""
    tensors: dict[str, Tensor] = {}
    factors: list[Factor] = []
    for weight, view in views.items():
        if wanted(weight):
            lora_a, lora_b = draw.pair(view)
            tensors[f"base_model.model.{weight}.lora_A.weight"] = lora_a
            tensors[f"base_model.model.{weight}.lora_B.weight"] = lora_b
            factors.append(Factor(weight, lora_a, lora_b, scaling(weight)))
    return Adapter(config, tensors, tuple(factors))


def per_expert(views: Views, seed: int) -> Adapter:
    """Attention and every expert, two tensors for each projection of each expert."""
    targets = sorted(
        {_leaf(weight) for weight in views if _is_attention(weight) or _is_split_expert(weight)}
    )
    return _from_pairs(
        views,
        peft_config(target_modules=targets),
        _Draw(seed, 0.05),
        lambda weight: _is_attention(weight) or _is_split_expert(weight),
        lambda _: 2.0,
    )


def half_experts(views: Views, seed: int) -> Adapter:
    """Only down_proj, only of every second expert, and no attention."""
    wanted = [
        weight
        for weight in views
        if ".experts." in weight
        and _leaf(weight) == "down_proj"
        and int(weight.split(".")[-2]) % 2 == 1
    ]
    # PEFT matches whole dotted suffixes: "experts.11.down_proj" and nothing else of that name.
    targets = sorted({weight[weight.index("experts.") :] for weight in wanted})
    config = peft_config(target_modules=targets)
    return _from_pairs(views, config, _Draw(seed, 0.45), set(wanted).__contains__, lambda _: 2.0)


def half_experts_padded(views: Views, seed: int) -> Adapter:
    """The same with zeros for everything else, because stock vLLM loads only complete adapters."""
    half = half_experts(views, seed)
    config = peft_config(target_modules=["gate_proj", "up_proj", "down_proj"])
    zeros = _from_pairs(views, config, _Draw(0, 0.0), _is_split_expert, lambda _: 2.0)
    return Adapter(config, zeros.tensors | half.tensors, half.factors)


def rslora(views: Views, seed: int) -> Adapter:
    """rsLoRA with an alpha_pattern, stored as float32: alpha / sqrt(r), other alphas for two leaves."""
    alphas = {"down_proj": 9, "q_proj": 2}
    default = 5
    config = peft_config(
        target_modules=[
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ],
        lora_alpha=default,
        alpha_pattern=alphas,
        use_rslora=True,
    )
    return _from_pairs(
        views,
        config,
        _Draw(seed, 0.05, torch.float32),
        lambda weight: _is_attention(weight) or _is_split_expert(weight),
        lambda weight: alphas.get(_leaf(weight), default) / LORA_RANK**0.5,
    )


def fused(views: Views, seed: int) -> Adapter:
    """Attention and, with `target_parameters`, the experts: four tensors for each MoE layer.

    The first parameter of the module (gate_up_proj, or up_proj without a gate) is `base_layer`.
    lora_A is `[E, r, in]` flattened, lora_B is `[out, r, E]` flattened: the expert varies fastest.
    """
    draw = _Draw(seed, 0.05)
    names = {_leaf(weight) for weight in views if ".experts." in weight}
    first = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
    attention = _from_pairs(views, {}, draw, _is_attention, lambda _: 2.0)
    tensors, factors = dict(attention.tensors), list(attention.factors)
    stems = sorted({weight.rsplit(".", 2)[0] for weight in views if ".experts." in weight})
    for experts in stems:
        for leaf, place in ((first, f"{experts}.base_layer"), ("down_proj", experts)):
            weights = [f"{experts}.{e}.{leaf}" for e in range(_num_experts(views, experts))]
            pairs = [draw.pair(views[weight]) for weight in weights]
            factors += [Factor(w, a, b, 2.0) for w, (a, b) in zip(weights, pairs)]
            prefix = f"base_model.model.{place}"
            tensors[f"{prefix}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
            tensors[f"{prefix}.lora_B.weight"] = torch.stack([b for _, b in pairs], 2).flatten(1)
    block = stems[0].rsplit(".", 2)[-2]
    config = peft_config(
        peft_version="0.19.1",
        target_modules=sorted(ATTENTION),
        target_parameters=[f"{block}.experts.{first}", f"{block}.experts.down_proj"],
    )
    return Adapter(config, tensors, tuple(factors))


def _num_experts(views: Views, experts: str) -> int:
    return sum(weight.startswith(f"{experts}.") for weight in views if _leaf(weight) == "down_proj")


# What a trainer makes step by step: the same form, other values.
VERSIONS = tuple(f"v{number}" for number in range(10))

RECIPES: Mapping[str, Callable[[Views], Adapter]] = {
    "e0": lambda views: per_expert(views, 100),
    "e1": lambda views: per_expert(views, 101),
    "e2": lambda views: per_expert(views, 102),
    "e3": lambda views: per_expert(views, 103),
    "half": lambda views: half_experts(views, 104),
    "half_padded": lambda views: half_experts_padded(views, 104),
    "rs": lambda views: rslora(views, 105),
    "fused0": lambda views: fused(views, 106),
    "fused1": lambda views: fused(views, 107),
    **{name: partial(per_expert, seed=200 + number) for number, name in enumerate(VERSIONS)},
}
