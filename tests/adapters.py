"""Tiny MoE adapters in every layout that lorashard reads, and the factors that are right for them.

Written without any of lorashard's code. Everything is moved as integers of the dtype's width, so
that no NaN payload and no -0.0 can change on the way. Layout numbers: docs/adapter-layouts.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.coded_values import Fill, Values

SPLIT = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")
NAMES = (*SPLIT, "gate_up_proj")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

ONE_TENSOR_PER_EXPERT = ("L1", "L1-w")
LAYOUTS = (
    *ONE_TENSOR_PER_EXPERT, "L2", "L2b", "L3", "L4-gate_up", "L4-down", "L5", "L6", "L7", "L8",
    "L9", "L10", "L11", "L12", "L13", "L14", "L15",
    "L16",
)  # fmt: skip
NON_GATED_LAYOUTS = (*ONE_TENSOR_PER_EXPERT, "L2", "L3", "L8")
_FUSED_LAYOUTS = {"L2", "L2b", "L3", "L5", "L6", "L7", "L13", "L14", "L15", "L16"}
_SWAPPED, _GROUPED = {"L3", "L5", "L7"}, {"L6", "L7"}

Factors = dict[tuple[str, int, str], tuple[Tensor, Tensor]]  # (module, expert, projection)


@dataclass(frozen=True)
class Spec:
    """What to build. Sizes default to odd ones, so that no two of them can be mixed up.

    experts, lora_ranks ({expert: r}) and projections are for layouts with a tensor per expert.
    """

    layout: str = "L1"
    num_experts: int = 4
    num_layers: int = 1
    lora_rank: int = 2
    hidden: int = 6
    intermediate: int = 5
    dtype: torch.dtype = torch.float32
    fill: Fill = "coded"
    seed: int = 0
    gated: bool = True
    extras: bool = False
    experts: tuple[int, ...] | None = None
    lora_ranks: Mapping[int, int] = field(default_factory=dict)
    projections: tuple[str, ...] | None = None
    rslora: bool = False
    peft_version: str | None = "0.21.2"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def block(self) -> str:
        """The MoE block's path in a layer."""
        return "block_sparse_moe" if self.layout in ("L5", "L1-w") else "mlp"

    def trained(self) -> tuple[str, ...]:
        """The projections that this adapter trains, as lorashard names them."""
        if self.projections is not None:
            return self.projections
        if self.layout.startswith("L4"):
            return (FUSED[self.layout == "L4-down"],)
        if not self.gated:
            return SPLIT[1:]
        return FUSED if self.layout in _FUSED_LAYOUTS else SPLIT

    def sizes(self, projection: str) -> tuple[int, int]:
        """(in, out) features."""
        if projection == "down_proj":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate * (2 if projection == "gate_up_proj" else 1)


@dataclass(frozen=True)
class Adapter:
    """tensors: the file's. factors: what every trained expert's lora_A and lora_B must be.

    options: the facts without which the layout cannot be read, as LayoutOptions fields.
    """

    spec: Spec
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    factors: Factors
    options: dict[str, Any]

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (directory / "adapter_config.json").write_text(text, encoding="utf-8")
        save_file(self.tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        return directory

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module for module, _, _ in self.factors))

    @property
    def replicated(self) -> dict[str, Tensor]:
        """The tensors that every rank gets under their own names."""
        return {n: t for n, t in self.tensors.items() if any(x in n for x in _EXTRA_MARKS)}


def build(spec: Spec) -> Adapter:
    """Make an adapter in memory."""
    factors: Factors = {}
    tensors: dict[str, Tensor] = {}
    values = Values(spec.dtype, spec.fill, spec.seed)
    for layer in range(spec.num_layers):
        block = f"model.layers.{layer}.{spec.block}"
        own = _layer_factors(spec, values, layer)
        factors |= {(f"{block}.experts", e, p): pair for (p, e), pair in own.items()}
        tensors |= _WRITERS[spec.layout](spec, f"base_model.model.{block}", own)
        if spec.extras:
            tensors |= dict(_extras(spec, values, layer, block))
    return Adapter(
        spec,
        {name: tensor.contiguous().clone().view(spec.dtype) for name, tensor in tensors.items()},
        _config(spec),
        {key: (a.view(spec.dtype), b.view(spec.dtype)) for key, (a, b) in factors.items()},
        _options(spec),
    )


def _layer_factors(
    spec: Spec, values: Values, layer: int
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    own: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for projection in spec.trained():
        inside, out = spec.sizes(projection)
        for expert in range(spec.num_experts) if spec.experts is None else spec.experts:
            r = spec.lora_ranks.get(expert, spec.lora_rank)
            r *= 2 if (spec.layout, projection) == ("L2b", "gate_up_proj") else 1
            number = 2 * NAMES.index(projection)
            a = values.matrix(layer, expert, number, r, inside)
            b = values.matrix(layer, expert, number + 1, out, r)
            if (spec.layout, projection) == ("L2b", "gate_up_proj"):
                b[: out // 2, r // 2 :] = 0
                b[out // 2 :, : r // 2] = 0
            first = own.get((projection, 0), (a, b))
            shared = _SHARED.get(spec.layout, {}).get(projection, "")
            own[projection, expert] = (
                first[0] if "A" in shared else a,
                first[1] if "B" in shared else b,
            )
    return own


_SHARED_OUTER = {"gate_proj": "A", "up_proj": "A", "down_proj": "B"}
_SHARED = {"L8": _SHARED_OUTER, "L9": _SHARED_OUTER, "L11": dict.fromkeys(SPLIT, "AB")}
_Own = Mapping[tuple[str, int], tuple[Tensor, Tensor]]


def _pair(key: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}


def _stacks(own: _Own, projection: str) -> tuple[Tensor, Tensor]:
    pairs = [pair for (p, _), pair in own.items() if p == projection]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def _per_expert(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    leaf = MIXTRAL if spec.layout == "L1-w" else dict(zip(SPLIT, SPLIT, strict=True))
    tensors: dict[str, Tensor] = {}
    for (p, e), pair in own.items():
        tensors |= _pair(f"{block}.experts.{e}.{leaf[p]}", *pair)
    return tensors


def _fused(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    keys = [f"{block}.experts.base_layer", f"{block}.experts"][-len(spec.trained()) :]
    if spec.layout == "L5":
        keys = [f"{block}.input_linear", f"{block}.output_linear"]
    tensors: dict[str, Tensor] = {}
    for key, projection in zip(keys, spec.trained(), strict=True):
        a, b = _stacks(own, projection)  # [E, r, in], [E, out, r]
        if spec.layout in _SWAPPED:
            a, b = b.mT, a.mT
        if spec.layout == "L16":
            tensors |= _pair(key, a, b.permute(1, 2, 0))
            continue
        columns = list(b) if spec.layout in _GROUPED else [b[:, :, k].T for k in range(b.shape[2])]
        tensors |= _pair(key, torch.cat(list(a)), torch.cat(columns, dim=1))
    return tensors


def _stacked(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for p in spec.trained():
        a, b = _stacks(own, p)
        shared = _SHARED.get(spec.layout, {}).get(p, "")
        a, b = a[:1] if "A" in shared else a, b[:1] if "B" in shared else b
        if spec.layout == "L11":
            a, b = a[0], b[0]
        leaf = p
        if spec.layout == "L8":  # without a gate, Tinker's w1 is the up projection and w3 empty
            leaf = MIXTRAL[p] if spec.gated or p == "down_proj" else "w1"
        container = block if spec.layout == "L12" else f"{block}.experts"
        tensors |= _pair(f"{container}.{leaf}", a, b)
    if spec.layout == "L8" and not spec.gated:
        tensors |= _pair(f"{block}.experts.w3", a[:0], b[:0])
    return tensors


def _shared_outer_mixed(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (p, e), pair in own.items():
        for matrix, factor in zip("AB", pair, strict=True):
            shared = matrix == _SHARED_OUTER[p]
            where = f"experts.{p}" if shared else f"experts.{e}.{p}"
            tensors[f"{block}.{where}.lora_{matrix}.weight"] = factor[None] if shared else factor
    return tensors


def _native(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for projection, leaf in zip(FUSED, ("gate_and_up", "down"), strict=True):
        for matrix, stack in zip("AB", _stacks(own, projection), strict=True):
            tensors[f"{block}.experts.lora_{leaf}_{matrix}"] = stack.mT
    return tensors


def _module_lists(spec: Spec, block: str, own: _Own) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (p, e), pair in own.items():
        tensors |= _pair(f"{block}.experts.{p}s.{e}", *pair)
    return tensors


_WRITERS = (
    dict.fromkeys(ONE_TENSOR_PER_EXPERT, _per_expert)
    | dict.fromkeys(("L2", "L2b", "L3", "L4-gate_up", "L4-down", "L5", "L6", "L7", "L16"), _fused)
    | dict.fromkeys(("L8", "L10", "L11", "L12", "L14"), _stacked)
    | {"L9": _shared_outer_mixed, "L13": _native, "L15": _module_lists}
)
_EXTRA_MARKS = (".self_attn.", ".gate.lora_", ".shared_expert.")


def _extras(
    spec: Spec, values: Values, layer: int, block: str
) -> Iterator[tuple[str, Tensor]]:  # attention, router, shared expert
    h, r = spec.hidden, spec.lora_rank
    places: Sequence[tuple[str, int]] = (
        (f"model.layers.{layer}.self_attn.q_proj", 2 * h),
        (f"{block}.gate", spec.num_experts),
        (f"{block}.shared_expert.up_proj", 7),
    )
    for i, (module, out) in enumerate(places):
        pair = values.matrix(layer, 0, 8 + 2 * i, r, h), values.matrix(layer, 0, 9 + 2 * i, out, r)
        yield from _pair(f"base_model.model.{module}", *pair).items()


def _config(spec: Spec) -> dict[str, Any]:
    rank_pattern: dict[str, int] = {rf"experts\.{e}\.\w+": r for e, r in spec.lora_ranks.items()}
    alpha_pattern: dict[str, float] = {}
    if spec.layout == "L2b":
        rank_pattern[r".*\.gate_up_proj"] = 2 * spec.lora_rank
        alpha_pattern[r".*\.gate_up_proj"] = 4 * spec.lora_rank
    parameters = None
    if _WRITERS[spec.layout] is _fused:
        names = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
        leaf = names if spec.layout == "L5" else {name: f"experts.{name}" for name in NAMES}
        parameters = [f"{spec.block}.{leaf[p]}" for p in spec.trained()]
    config: dict[str, Any] = {
        "base_model_name_or_path": "tiny/moe", "bias": "none", "init_lora_weights": True,
        "lora_alpha": 2 * spec.lora_rank, "peft_type": "LORA", "r": spec.lora_rank,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "target_modules": [],
        "target_parameters": parameters, "use_dora": False, "use_rslora": spec.rslora,
    }  # fmt: skip
    if spec.layout in _GROUPED:
        config["lora_B_layout"] = "grouped_by_expert"
    if spec.peft_version is not None:
        config["peft_version"] = spec.peft_version
    return config | dict(spec.config)


def _options(spec: Spec) -> dict[str, Any]:
    options: dict[str, Any] = {}
    fused_without_gate = not spec.gated and _WRITERS[spec.layout] is _fused
    if spec.layout.startswith("L4") or fused_without_gate:
        options["orientation"] = "transposed" if spec.layout in _SWAPPED else "standard"
    counted = spec.num_experts > 1 and spec.layout != "L11"
    # An r that is no lower than the features needs other tensors of that r, or the count.
    fits = spec.extras or 2 * spec.lora_rank < min(spec.hidden, spec.intermediate)
    counted &= fits or _WRITERS[spec.layout] is not _fused
    if not counted or spec.experts is not None:
        options["num_experts"] = spec.num_experts
    return options
