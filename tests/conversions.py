"""What the tests of `convert` share: adapters split and converted, and what must come out of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorashard import LayoutOptions, LorashardError, SplitRequest, convert_shards, split_adapter
from lorashard.convert.target import PeftTarget
from lorashard.errors import LayoutError
from tests.adapters import Adapter
from tests.coded_values import bits
from tests.deltas import expert_deltas
from tests.tiny import contents

PEFT_LAYOUTS = ("per_expert", "fused")
UNNAMED = {"base_model_name_or_path": None}

Pairs = dict[tuple[str, int, str], tuple[Tensor, Tensor]]  # (module, expert, projection)


class Work:
    """One adapter in a folder, split and converted; `model` is the base model's config.json."""

    def __init__(self, folder: Path, adapter: Adapter, model_type: str | None = None) -> None:
        self.folder, self.adapter, spec = folder, adapter, adapter.spec
        self.source = adapter.write(folder / "adapter")
        self.shards, self.out = folder / "shards", folder / "out"
        self.model = folder / "config.json"  # in the folder that `write` has made
        sizes = {"hidden_size": spec.hidden, "moe_intermediate_size": spec.intermediate}
        model_type = model_type or ("qwen3_moe" if spec.gated else "nemotron_h")
        facts = {"model_type": model_type, "num_experts": spec.num_experts, **sizes}
        self.model.write_text(json.dumps(facts))

    def split(self, ep_size: int = 3, ranks: Any = None, dtype: str | None = None) -> Work:
        expert_map = None
        if ranks is not None:
            expert_map = self.folder / "map.json"
            expert_map.write_text(json.dumps(ranks))
        options = LayoutOptions(**self.adapter.options)
        request = SplitRequest(ep_size, expert_map=expert_map, dtype=dtype, options=options)
        split_adapter(self.source, self.shards, request)
        return self

    def convert(self, layout: str, **options: Any) -> Work:
        convert_shards(self.shards, self.out, layout, **({"model": self.model} | options))
        return self

    def split_again(self) -> Path:
        again = self.folder / "again"
        if not again.exists():
            # Without a gate, or with one parameter, the shapes alone leave this open.
            options = LayoutOptions(orientation="standard")
            request = SplitRequest(2, "round_robin", model=self.model, options=options)
            split_adapter(self.out, again, request)
        return again

    def pairs(self) -> Pairs:
        return read_pairs(load_file(self.out / "adapter_model.safetensors"), self.adapter)


def read_pairs(tensors: Mapping[str, Tensor], adapter: Adapter) -> Pairs:
    """What a PEFT adapter says each expert's factors are; fused ones in the standard way round."""
    pairs: Pairs = {}
    fused = next(p for p in ("gate_up_proj", "up_proj") if adapter.spec.gated == (p[0] == "g"))
    count = adapter.spec.num_experts
    for name, a in tensors.items():
        module, marker, rest = name.removeprefix("base_model.model.").partition(".experts.")
        if not marker or not rest.endswith("lora_A.weight"):
            continue
        b, module = tensors[name.replace("lora_A", "lora_B")], f"{module}.experts"
        expert, _, leaf = rest.removesuffix(".lora_A.weight").partition(".")
        if expert.isdecimal():
            spelled = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
            pairs[module, int(expert), spelled.get(leaf, leaf)] = a, b
            continue
        two = name.replace(rest, "base_layer.lora_A.weight") in tensors
        single = adapter.spec.trained()
        projection = fused if rest.startswith("base") or not (two or "down_proj" in single) else ""
        r = len(a) // count
        for e in range(count):
            own = a[e * r : (e + 1) * r], b.reshape(len(b), r, count)[:, :, e]
            pairs[module, e, projection or "down_proj"] = own
    return pairs


def wanted_pairs(adapter: Adapter, layout: str) -> Pairs:
    """What they have to be; an expert that is not trained has none."""
    pairs: Pairs = {}
    inputs: dict[str, list[bool]] = {}
    for (module, expert, projection), (a, b) in adapter.factors.items():
        if projection == "gate_proj":
            up = adapter.factors.get((module, expert, "up_proj"))
            inputs.setdefault(module, []).append(
                up is not None and torch.equal(bits(a), bits(up[0]))
            )
        if layout == "per_expert" and projection == "gate_up_proj":
            gate, up_rows = b.chunk(2)
            pairs[module, expert, "gate_proj"] = a, gate
            pairs[module, expert, "up_proj"] = a, up_rows
        elif layout == "per_expert" or projection in ("gate_up_proj", "down_proj"):
            pairs[module, expert, projection] = a, b
    for (module, expert, projection), (a, b) in adapter.factors.items():
        if layout == "per_expert" or projection not in ("gate_proj", "up_proj"):
            continue
        if not adapter.spec.gated:
            pairs[module, expert, "up_proj"] = a, b
        elif projection == "gate_proj":
            up_a, up_b = adapter.factors[module, expert, "up_proj"]
            joint = (a, torch.cat([b, up_b]))
            apart = (torch.cat([a, up_a]), torch.block_diag(b, up_b).to(b.dtype))
            pairs[module, expert, "gate_up_proj"] = joint if all(inputs[module]) else apart
    return pairs


def wrong_pairs(work: Work, layout: str) -> list[str]:
    """Which factors differ in a bit; what is beyond the wanted ones must be zero."""
    found, wanted = work.pairs(), wanted_pairs(work.adapter, layout)
    wrong = []
    for key, pair in found.items():
        for matrix, factor in zip("AB", pair, strict=True):
            full = torch.zeros_like(bits(factor))
            if key in wanted:
                own = bits(wanted[key]["AB".index(matrix)])
                full[: own.shape[0], : own.shape[1]] = own
            if not torch.equal(bits(factor), full):
                wrong.append(f"{key} {matrix}")
    return wrong + [f"{key} is missing" for key in wanted.keys() - found.keys()]


def deltas(shards: Path) -> dict[str, Tensor]:
    manifest = json.loads((shards / "lorashard.json").read_bytes())
    return dict(expert_deltas(shards, manifest, torch.float64))


def assert_same_deltas(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    """The same experts with the same weight changes; an untrained one may be left out or be zero."""
    for key in one.keys() | two.keys():
        if key not in one or key not in two:
            assert not (one.get(key, two.get(key))).any(), f"{key} is on one side only"  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(one[key], two[key], rtol=1e-12, atol=1e-12, msg=key)


def config_of(work: Work) -> dict[str, Any]:
    return json.loads((work.out / "adapter_config.json").read_text())


def refused(
    shards: Path, layout: Any, kind: type[LorashardError] = LayoutError, **options: Any
) -> str:
    """Converting raises `kind`, changes nothing and leaves nothing; the message."""
    before = contents(shards.parent)
    with pytest.raises(kind) as caught:
        convert_shards(shards, shards.parent / "new" / "out", layout, **options)
    assert contents(shards.parent) == before
    assert not (shards.parent / "new").exists()
    return str(caught.value)


def peft_target(layout: str = "fused", **fields: Any) -> PeftTarget:
    """A target for which everything is known: Qwen3-MoE, stacks in F32."""
    known: dict[str, Any] = {
        "layout": layout, "gate_up": "concatenated", "gate_up_stated": True,
        "orientation": "standard", "use_rslora": False, "modules_with_equal_inputs": frozenset(),
        "stack_dtypes": defaultdict(lambda: "F32"), "model_names": "qwen3_moe",
    }  # fmt: skip
    return PeftTarget(**(known | fields))
