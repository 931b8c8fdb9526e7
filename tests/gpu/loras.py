"""The adapters of the acceptance: files as PEFT writes them, and what each does to which weight.

Shape letters: `E` experts, `r` LoRA rank, `H` hidden size, `I` expert intermediate size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.gpu.adapter import LORA_RANK, Adapter, Factor, peft_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# DeepSeek's; without kv_b_proj, whose LoRA vLLM does not apply to tokens that it decodes.
LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")

Views = Mapping[str, Tensor]


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
    return _leaf(weight) in ATTENTION + LATENT_ATTENTION


def _is_shared_expert(weight: str) -> bool:
    return f".{weight}".split(".")[-2] in SHARED_EXPERTS


def _is_linear_attention(weight: str) -> bool:
    return f".{weight}".split(".")[-2] == "linear_attn"


def _nothing(_: str) -> bool:
    return False


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


def per_expert(views: Views, seed: int, also: Callable[[str], bool] = _nothing) -> Adapter:
    """Attention and every expert, two tensors for each projection of each expert.

    also: other weights that get LoRA.
    """

    def is_wanted(weight: str) -> bool:
        return _is_attention(weight) or _is_split_expert(weight) or also(weight)

    config = peft_config(target_modules=sorted({_leaf(w) for w in views if is_wanted(w)}))
    return _from_pairs(views, config, _Draw(seed, 0.05), is_wanted, lambda _: 2.0)


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


def fused(
    views: Views,
    seed: int,
    also: Callable[[str], bool] = _nothing,
    *,
    swapped: bool = False,
    linears: bool = False,
) -> Adapter:
    """Attention and, with `target_parameters`, the experts: four tensors for each MoE layer.

    The first parameter of the module (gate_up_proj, or up_proj without a gate) is `base_layer`.
    lora_A is `[E, r, in]` flattened, lora_B is `[out, r, E]` flattened: the expert varies fastest.
    also: other weights that get LoRA. swapped: the parameter was taken for `[E, in, out]`, or the
    other way round, so lora_A has `out` and lora_B has `in`. linears: Granite's names in
    transformers 4, `input_linear` and `output_linear` beside where the experts are now.
    """
    draw = _Draw(seed, 0.05)
    names = {_leaf(weight) for weight in views if ".experts." in weight}
    first = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
    dense = [weight for weight in views if _is_attention(weight) or also(weight)]
    others = _from_pairs(views, {}, draw, set(dense).__contains__, lambda _: 2.0)
    tensors, factors = dict(others.tensors), list(others.factors)
    stems = sorted({weight.rsplit(".", 2)[0] for weight in views if ".experts." in weight})
    places = (
        ("{0}.input_linear", "{0}.output_linear")
        if linears
        else ("{0}.experts.base_layer", "{0}.experts")
    )
    for experts in stems:
        block = experts.removesuffix(".experts")
        for leaf, place in zip((first, "down_proj"), places):
            weights = [f"{experts}.{e}.{leaf}" for e in range(_num_experts(views, experts))]
            pairs = [draw.pair(views[weight]) for weight in weights]
            factors += [Factor(w, a, b, 2.0) for w, (a, b) in zip(weights, pairs)]
            stored = [(b.t(), a.t()) for a, b in pairs] if swapped else pairs
            prefix = f"base_model.model.{place.format(block)}"
            tensors[f"{prefix}.lora_A.weight"] = torch.cat([a for a, _ in stored])
            tensors[f"{prefix}.lora_B.weight"] = torch.stack([b for _, b in stored], 2).flatten(1)
    name = stems[0].rsplit(".", 2)[-2]
    parameters = (
        ("input_linear.weight", "output_linear.weight")
        if linears
        else (f"experts.{first}", "experts.down_proj")
    )
    config = peft_config(
        peft_version="0.18.1" if linears else "0.19.1",
        target_modules=sorted({_leaf(weight) for weight in dense}),
        target_parameters=[f"{name}.{parameter}" for parameter in parameters],
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
    "shared0": lambda views: per_expert(views, 108, _is_shared_expert),
    "linear0": lambda views: per_expert(views, 109, _is_linear_attention),
    "swapped0": lambda views: fused(views, 110, swapped=True),
    "linears0": lambda views: fused(views, 111, swapped=True, linears=True),
    "fused_shared0": lambda views: fused(views, 112, _is_shared_expert),
    "text0": lambda views: per_expert(views, 113).renamed([("language_model.", "")]),
    **{name: partial(per_expert, seed=200 + number) for number, name in enumerate(VERSIONS)},
}
