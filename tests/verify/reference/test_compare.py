"""The proof finds nothing in right shards and names the place in wrong ones.

The shards here come from a naive writer: per-expert factors, stacked. The sources are made from
the same factors, element by element, so that no reshape is trusted twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.verify.reference.compare import compare_with_source

E, R, H, I = 4, 2, 6, 5  # noqa: E741 - experts, lora_rank, hidden and intermediate size
SIZES = {"gate_proj": (H, I), "up_proj": (H, I), "down_proj": (I, H), "gate_up_proj": (H, 2 * I)}
SPLIT = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")
BLOCK = "model.layers.0.mlp"
MODULE = f"{BLOCK}.experts"
KEY = f"base_model.model.{MODULE}"
ROUTER = f"base_model.model.{BLOCK}.gate.lora_A.weight"
RANKS = [[2, 0], [1, 3]]
RANK_0, RANK_1 = "ep-00000-of-00002.safetensors", "ep-00001-of-00002.safetensors"
REPLICATED = "replicated.safetensors"

Factors = dict[tuple[str, int], tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]


def make_factors(projections: tuple[str, ...], lora_rank: int = R) -> Factors:
    generator = torch.Generator().manual_seed(1)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    return {
        (name, e): (random(lora_rank, SIZES[name][0]), random(SIZES[name][1], lora_rank))
        for name in projections
        for e in range(E)
    }


def share(factors: Factors, projection: str, side: int) -> Factors:
    """Give every expert the factor of expert 0."""
    shared = dict(factors)
    for e in range(E):
        a, b = factors[projection, e]
        first = factors[projection, 0]
        shared[projection, e] = (first[0], b) if side == 0 else (a, first[1])
    return shared


@dataclass
class Case:
    """A source adapter and the factors that are right for it."""

    factors: Factors
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shared: tuple[tuple[str, str], ...] = ()
    module: str = MODULE


def per_expert(names: dict[str, str] | None = None) -> Case:
    factors = make_factors(SPLIT)
    tensors = {}
    for (projection, e), (a, b) in factors.items():
        leaf = (names or {}).get(projection, projection)
        tensors[f"{KEY}.{e}.{leaf}.lora_A.weight"] = a
        tensors[f"{KEY}.{e}.{leaf}.lora_B.weight"] = b
    return Case(factors, tensors)


def fuse(
    factors: Factors, projection: str, *, swapped: bool, grouped: bool
) -> tuple[Tensor, Tensor]:
    """One PEFT pair for all experts, written element by element."""
    num_in, num_out = reversed(SIZES[projection]) if swapped else SIZES[projection]
    lora_a, lora_b = torch.empty(E * R, num_in), torch.empty(num_out, E * R)
    for e in range(E):
        a, b = factors[projection, e]
        if swapped:
            a, b = b.T, a.T
        for k in range(R):
            lora_a[e * R + k] = a[k]
            lora_b[:, e * R + k if grouped else k * E + e] = b[:, k]
    return lora_a, lora_b


def fused(
    *,
    swapped: bool = False,
    grouped: bool = False,
    keys: tuple[str, ...] = (f"{KEY}.base_layer", KEY),
    projections: tuple[str, ...] = FUSED,
) -> Case:
    factors = make_factors(projections)
    tensors = {}
    for key, projection in zip(keys, projections, strict=True):
        pair = fuse(factors, projection, swapped=swapped, grouped=grouped)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = pair
    return Case(factors, tensors)


def fused_marked_grouped() -> Case:
    case = fused(grouped=True)
    case.config["lora_B_layout"] = "grouped_by_expert"
    return case


def fused_grouped_by_option() -> Case:
    case = fused(swapped=True, grouped=True)
    case.options["lora_b_layout"] = "grouped_by_expert"
    return case


def granite() -> Case:
    block = "base_model.model.model.layers.0.block_sparse_moe"
    case = fused(swapped=True, keys=(f"{block}.input_linear", f"{block}.output_linear"))
    case.module = "model.layers.0.block_sparse_moe.experts"
    return case


def fused_single(projection: str) -> Case:
    case = fused(keys=(KEY,), projections=(projection,))
    case.config["target_parameters"] = [f"mlp.experts.{projection}"]
    case.options["hidden_size"] = H
    return case


def fused_single_beside_attention() -> Case:
    case = fused_single("down_proj")
    case.options["hidden_size"] = None
    case.tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(
        R, H
    )
    return case


def fused_non_gated() -> Case:
    case = fused(projections=("up_proj", "down_proj"))
    case.config["target_parameters"] = ["experts.up_proj", "experts.down_proj"]
    case.options["hidden_size"] = H
    return case


def stacked(path: str, projections: tuple[str, ...] = SPLIT) -> Case:
    factors = make_factors(projections)
    tensors = {}
    for projection in projections:
        for side, matrix in enumerate(("lora_A", "lora_B")):
            stack = torch.stack([factors[projection, e][side] for e in range(E)])
            tensors[f"{path}.{projection}.{matrix}.weight"] = stack
    return Case(factors, tensors)


def native() -> Case:
    factors = make_factors(FUSED)
    tensors = {}
    for projection, name in (("gate_up_proj", "gate_and_up"), ("down_proj", "down")):
        for side, matrix in enumerate("AB"):
            stack = torch.stack([factors[projection, e][side].T for e in range(E)])
            tensors[f"{KEY}.lora_{name}_{matrix}"] = stack
    return Case(factors, tensors)


def expert_lists() -> Case:
    factors = make_factors(FUSED)
    tensors = {}
    for (projection, e), pair in factors.items():
        for matrix, value in zip("AB", pair, strict=True):
            tensors[f"{KEY}.{projection}s.{e}.lora_{matrix}.weight"] = value
    return Case(factors, tensors)


def shared_outer_stacked() -> Case:
    """As Tinker writes it, for experts without a gate: w3 is there and empty."""
    factors = make_factors(("up_proj", "down_proj"))
    factors = share(share(factors, "up_proj", 0), "down_proj", 1)
    tensors = {
        f"{KEY}.w1.lora_A.weight": factors["up_proj", 0][0][None],
        f"{KEY}.w1.lora_B.weight": torch.stack([factors["up_proj", e][1] for e in range(E)]),
        f"{KEY}.w2.lora_A.weight": torch.stack([factors["down_proj", e][0] for e in range(E)]),
        f"{KEY}.w2.lora_B.weight": factors["down_proj", 0][1][None],
        f"{KEY}.w3.lora_A.weight": torch.empty(0, R, H),
        f"{KEY}.w3.lora_B.weight": torch.empty(0, I, R),
    }
    return Case(factors, tensors, shared=(("up_proj", "lora_A"), ("down_proj", "lora_B")))


def shared_outer_mixed() -> Case:
    factors = share(make_factors(("gate_proj", "down_proj")), "gate_proj", 0)
    tensors = {f"{KEY}.gate_proj.lora_A.weight": factors["gate_proj", 0][0][None]}
    for e in range(E):
        tensors[f"{KEY}.{e}.gate_proj.lora_B.weight"] = factors["gate_proj", e][1]
        for matrix, value in zip("AB", factors["down_proj", e], strict=True):
            tensors[f"{KEY}.{e}.down_proj.lora_{matrix}.weight"] = value
    return Case(factors, tensors, shared=(("gate_proj", "lora_A"),))


def one_pair_for_all() -> Case:
    factors = share(share(make_factors(("down_proj",)), "down_proj", 0), "down_proj", 1)
    a, b = factors["down_proj", 0]
    tensors = {f"{KEY}.down_proj.lora_A": a, f"{KEY}.down_proj.lora_B": b}
    return Case(factors, tensors, shared=(("down_proj", "lora_A"), ("down_proj", "lora_B")))


@dataclass
class Adapter:
    """A source directory, its shard directory and the manifest as parsed JSON."""

    source: Path
    shards: Path
    manifest: dict[str, Any]
    counted: list[int] = field(default_factory=list)

    @property
    def module(self) -> dict[str, Any]:
        described: dict[str, Any] = self.manifest["modules"][MODULE]
        return described

    def findings(self, *, allow_pickle: bool = False) -> list[str]:
        comparisons = compare_with_source(
            self.shards,
            self.source,
            self.manifest,
            self.counted.append,
            allow_pickle=allow_pickle,
        )
        return list(chain.from_iterable(comparisons))

    def edit(self, file: str, change: Callable[[Tensors], object]) -> None:
        tensors = load_file(self.shards / file)
        change(tensors)
        save_file(tensors, self.shards / file)


def build(
    tmp_path: Path,
    case: Case,
    ranks: list[list[int]] | None = None,
    cast: tuple[str, torch.dtype] | None = None,
) -> Adapter:
    """Write shards naively: one stack per rank, projection and matrix."""
    ranks = ranks or RANKS
    source, shards = tmp_path / "source", tmp_path / "shards"
    source.mkdir()
    shards.mkdir()
    tensors = {ROUTER: torch.randn(R, H)} | case.tensors
    config = {"r": R, "lora_alpha": 8, "peft_version": "0.18.0"} | case.config
    save_file({n: t.contiguous() for n, t in tensors.items()}, source / "adapter_model.safetensors")
    for directory in (source, shards):
        (directory / "adapter_config.json").write_text(json.dumps(config))

    replicated = {n: t for n, t in tensors.items() if n == ROUTER or "self_attn" in n}
    files: list[Tensors] = [{} for _ in ranks]
    projections = sorted({projection for projection, _ in case.factors})
    for projection in projections:
        for side, matrix in enumerate(("lora_A", "lora_B")):
            name = f"{case.module}.{projection}.{matrix}"
            if (projection, matrix) in case.shared:
                replicated[name] = case.factors[projection, 0][side][None]
                continue
            for file, experts in zip(files, ranks, strict=True):
                file[name] = torch.stack([case.factors[projection, e][side] for e in experts])
    for file_name, content in [(REPLICATED, replicated)] + [
        (f"ep-{k:05d}-of-{len(ranks):05d}.safetensors", file) for k, file in enumerate(files)
    ]:
        dtype = torch.float32 if cast is None else cast[1]
        written = {name: tensor.to(dtype).contiguous() for name, tensor in content.items()}
        save_file(written, shards / file_name)

    options = {"hidden_size": None, "intermediate_size": None, "orientation": None}
    module = {"lora_rank": R, "scaling": dict.fromkeys(projections, 4.0), "absent_experts": []}
    manifest = {
        "options": options | {"lora_b_layout": None, "dtype": cast and cast[0]} | case.options,
        "placement": {"ep_size": len(ranks), "num_experts": E, "ranks": ranks},
        "modules": {case.module: module},
    }
    return Adapter(source, shards, manifest)


@pytest.fixture(params=[8, 2**19])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two values at a time, or a tensor."""
    monkeypatch.setattr("lorashard.verify.reference.values._CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(per_expert(), id="per_expert"),
        pytest.param(
            per_expert({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}), id="per_expert_w"
        ),
        pytest.param(fused(), id="fused"),
        pytest.param(fused(swapped=True), id="fused_swapped"),
        pytest.param(fused_marked_grouped(), id="fused_grouped"),
        pytest.param(fused_grouped_by_option(), id="fused_swapped_grouped"),
        pytest.param(fused_single("gate_up_proj"), id="fused_gate_up_only"),
        pytest.param(fused_single("down_proj"), id="fused_down_only"),
        pytest.param(fused_single_beside_attention(), id="fused_down_only_beside_attention"),
        pytest.param(fused_non_gated(), id="fused_non_gated"),
        pytest.param(granite(), id="granite"),
        pytest.param(stacked(KEY), id="stacked"),
        pytest.param(stacked(KEY, FUSED), id="stacked_gate_up"),
        pytest.param(stacked(f"base_model.model.{BLOCK}"), id="stacked_dense_looking"),
        pytest.param(native(), id="native"),
        pytest.param(expert_lists(), id="expert_lists"),
        pytest.param(shared_outer_stacked(), id="shared_outer_stacked"),
        pytest.param(shared_outer_mixed(), id="shared_outer_mixed"),
        pytest.param(one_pair_for_all(), id="one_pair_for_all"),
    ],
)
def test_right_shards_give_no_finding(tmp_path: Path, case: Case) -> None:
    adapter = build(tmp_path, case)
    assert adapter.findings() == []
    source = load_file(adapter.source / "adapter_model.safetensors")
    assert sum(adapter.counted) == sum(tensor.nbytes for tensor in source.values())


def test_a_cast_is_compared_with_the_cast_source(tmp_path: Path) -> None:
    assert build(tmp_path, fused(swapped=True), cast=("BF16", torch.bfloat16)).findings() == []


def test_a_cast_that_the_manifest_does_not_name_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert(), cast=("BF16", torch.bfloat16))
    adapter.manifest["options"]["dtype"] = None
    assert (
        "expert 2 (slot 0): dtype is torch.bfloat16, in the source torch.float32."
        in (adapter.findings()[1])
    )


def test_an_expert_on_several_ranks_is_compared_on_each(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert(), ranks=[[0, 1, 2], [2, 3]])
    assert adapter.findings() == []
    weights = load_file(adapter.source / "adapter_model.safetensors")
    assert sum(adapter.counted) == sum(tensor.nbytes for tensor in weights.values())
    name = f"{MODULE}.up_proj.lora_B"
    adapter.edit(RANK_1, lambda tensors: tensors[name][0].zero_())
    (finding,) = adapter.findings()
    assert finding.startswith(f"{RANK_1}: {name}: expert 2 (slot 0): [0, 0] is 0.0 (0x00000000)")


def test_a_placement_of_one_layer_counts_for_that_layer(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    placement = adapter.manifest["placement"]
    placement["layers"] = {MODULE: placement["ranks"]}
    placement["ranks"] = [[0, 1], [2, 3]]
    assert adapter.findings() == []


def test_a_placement_that_leaves_an_expert_out_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.manifest["placement"]["ranks"] = [[2, 0], [1, 1]]
    expected = f"lorashard.json: the placement of {MODULE} does not hold every expert."
    assert adapter.findings() == [expected]


@pytest.mark.parametrize("chunk_bytes", [4, 20, 64, 4096])
@pytest.mark.parametrize("ranks", [[[2, 0], [1, 3]], [[0, 1, 2], [2, 3]], [[3, 1, 0, 2]]])
def test_every_wrong_value_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, ranks: list[list[int]]
) -> None:
    monkeypatch.setattr("lorashard.verify.reference.values._CHUNK_BYTES", chunk_bytes)
    adapter = build(tmp_path, per_expert(), ranks=ranks)
    name, last = f"{MODULE}.down_proj.lora_B", f"ep-{len(ranks) - 1:05d}-of-{len(ranks):05d}"
    right = load_file(adapter.shards / f"{last}.safetensors")
    for slot, row in product(range(len(ranks[-1])), range(H)):
        wrong = right[name].clone()
        wrong[slot, row:] += 1
        wrong[(slot + 1) % len(wrong), -1, -1] += 1
        save_file(right | {name: wrong}, adapter.shards / f"{last}.safetensors")
        first, second = sorted([(slot, row, 0), ((slot + 1) % len(wrong), H - 1, R - 1)])
        expected = [
            f"{last}.safetensors: {name}: expert {ranks[-1][s]} (slot {s}): [{r}, {c}] is "
            for s, r, c in (first, second)
        ]
        findings = adapter.findings()
        assert len(findings) == 2
        assert all(map(str.startswith, findings, expected))


@pytest.mark.parametrize("make", [per_expert, fused])
def test_one_flipped_bit_is_found(tmp_path: Path, make: Callable[[], Case]) -> None:
    adapter = build(tmp_path, make())
    name = f"{MODULE}.down_proj.lora_A"

    def flip(tensors: Tensors) -> None:
        tensors[name].view(torch.int32)[1, 1, 3] ^= 1

    adapter.edit(RANK_1, flip)
    (finding,) = adapter.findings()
    assert finding.startswith(f"{RANK_1}: {name}: expert 3 (slot 1): [1, 3] is ")


def test_nan_equals_the_same_nan_only(tmp_path: Path) -> None:
    case = per_expert()
    case.factors["down_proj", 0][0].view(torch.int32)[0, 0] = 0x7FC00001
    adapter = build(tmp_path, case)
    assert adapter.findings() == []

    def other_nan(tensors: Tensors) -> None:
        tensors[f"{MODULE}.down_proj.lora_A"].view(torch.int32)[1, 0, 0] = 0x7FC00002

    adapter.edit(RANK_0, other_nan)
    (finding,) = adapter.findings()
    assert "[0, 0] is nan (0x7fc00002), from the source nan (0x7fc00001)." in finding


def test_two_experts_swapped_within_a_rank_are_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    name = f"{MODULE}.gate_proj.lora_B"
    adapter.edit(RANK_0, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    first, second = adapter.findings()
    assert first.startswith(f"{RANK_0}: {name}: expert 2 (slot 0): ")
    assert second.startswith(f"{RANK_0}: {name}: expert 0 (slot 1): ")


def test_swapped_ranks_are_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, fused())
    (adapter.shards / RANK_0).rename(adapter.shards / "moved")
    (adapter.shards / RANK_1).rename(adapter.shards / RANK_0)
    (adapter.shards / "moved").rename(adapter.shards / RANK_1)
    findings = adapter.findings()
    assert len(findings) == len(FUSED) * 2 * E
    assert findings[0].startswith(f"{RANK_0}: {MODULE}.gate_up_proj.lora_A: expert 2 (slot 0): ")


def test_rank_major_columns_read_as_grouped_are_found(tmp_path: Path) -> None:
    case = fused(grouped=True)  # the shards follow the marker that the source does not have
    findings = build(tmp_path, case).findings()
    assert findings
    assert all("lora_B: expert" in finding for finding in findings)


def test_contradicting_lora_b_layouts_are_found(tmp_path: Path) -> None:
    case = fused(grouped=True)
    case.config["lora_B_layout"] = "rank_major"
    case.options["lora_b_layout"] = "grouped_by_expert"
    (finding,) = build(tmp_path, case).findings()
    assert finding.startswith("adapter_config.json: lora_B_layout is rank_major, but")


@pytest.mark.parametrize("wrong", [None, "4.0", float("nan"), [4.0]])
def test_a_scaling_that_is_no_scaling_is_found(tmp_path: Path, wrong: object) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.module["scaling"]["up_proj"] = wrong
    assert all("up_proj: scaling " in finding for finding in adapter.findings() or [""])


@pytest.mark.parametrize("wrong", [2.0, [4.0, 4.0, 2.0, 4.0]])
def test_wrong_scaling_is_found(tmp_path: Path, wrong: object) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.module["scaling"]["up_proj"] = wrong
    expected = (
        f"lorashard.json: module {MODULE}: up_proj: scaling of expert 2 is 2.0, "
        "from the source 4.0."
    )
    assert expected in adapter.findings()


def test_scaling_follows_patterns_and_rslora(tmp_path: Path) -> None:
    case = per_expert()
    case.config |= {"use_rslora": True, "alpha_pattern": {r"experts\.3\.up_proj": 32, "up_proj": 1}}
    adapter = build(tmp_path, case)
    scaling = 8 / 2**0.5
    adapter.module["scaling"] = {
        "gate_proj": scaling,
        "up_proj": [scaling / 8, scaling / 8, scaling / 8, scaling * 4],
        "down_proj": scaling,
    }
    assert adapter.findings() == []


def test_fused_scaling_follows_the_parameter_name(tmp_path: Path) -> None:
    case = fused()
    case.config["alpha_pattern"] = {r".*\.gate_up_proj": 16}
    adapter = build(tmp_path, case)
    adapter.module["scaling"]["gate_up_proj"] = 8.0
    assert adapter.findings() == []


def test_a_missing_replicated_tensor_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.edit(REPLICATED, lambda tensors: tensors.pop(ROUTER))
    assert adapter.findings() == [f"{REPLICATED}: {ROUTER} is missing."]


def test_a_replicated_tensor_with_other_values_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.edit(REPLICATED, lambda tensors: tensors[ROUTER][1, 2:].zero_())
    (finding,) = adapter.findings()
    assert finding.startswith(
        f"{REPLICATED}: {ROUTER}: [1, 2] is 0.0 (0x00000000), from the source"
    )


def test_a_padded_replicated_tensor_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())

    def pad(tensors: Tensors) -> None:
        tensors[ROUTER] = torch.cat([tensors[ROUTER], torch.zeros(1, H)])

    adapter.edit(REPLICATED, pad)
    expected = (
        f"{REPLICATED}: {ROUTER}: shape is torch.Size([3, 6]), in the source torch.Size([2, 6])."
    )
    assert adapter.findings() == [expected]


def test_a_wrong_shared_factor_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, shared_outer_stacked())
    name = f"{MODULE}.down_proj.lora_B"
    adapter.edit(REPLICATED, lambda tensors: tensors[name].neg_())
    (finding,) = adapter.findings()
    assert finding.startswith(f"{REPLICATED}: {name}: shared by all experts: [0, 0] is ")


@pytest.mark.parametrize("file", [REPLICATED, RANK_0, RANK_1])
def test_an_extra_tensor_is_found(tmp_path: Path, file: str) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.edit(file, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    (finding,) = adapter.findings()
    assert finding.startswith(f"{file}: model.extra is not ")


def test_a_missing_expert_tensor_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    name = f"{MODULE}.up_proj.lora_A"
    adapter.edit(RANK_1, lambda tensors: tensors.pop(name))
    assert adapter.findings() == [f"{RANK_1}: {name}: is missing."]


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    (adapter.shards / RANK_1).unlink()
    assert adapter.findings() == [f"{RANK_1}: missing, or not a safetensors file."]


def test_a_changed_config_is_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    with (adapter.shards / "adapter_config.json").open("a") as file:
        file.write("\n")
    assert adapter.findings() == ["adapter_config.json: not the same bytes as in the source."]


def uneven(tmp_path: Path) -> Adapter:
    """Expert 1 has r 1 in down_proj, expert 3 is not trained."""
    case = per_expert()
    a, b = case.factors["down_proj", 1]
    a[1:], b[:, 1:] = 0, 0
    case.tensors[f"{KEY}.1.down_proj.lora_A.weight"] = a[:1].clone()
    case.tensors[f"{KEY}.1.down_proj.lora_B.weight"] = b[:, :1].clone()
    for projection in SPLIT:
        for matrix, factor in zip("AB", case.factors[projection, 3], strict=True):
            del case.tensors[f"{KEY}.3.{projection}.lora_{matrix}.weight"]
            factor.zero_()
    case.config["rank_pattern"] = {r"experts\.1\.down_proj": 1}
    adapter = build(tmp_path, case)
    adapter.module["absent_experts"] = [3]
    adapter.module["expert_lora_ranks"] = {p: {"3": 0} for p in SPLIT}
    adapter.module["expert_lora_ranks"]["down_proj"]["1"] = 1
    adapter.module["scaling"] = {p: [4.0, 4.0, 4.0, 0.0] for p in SPLIT}
    adapter.module["scaling"]["down_proj"][1] = 8.0
    return adapter


@pytest.mark.usefixtures("chunks")
def test_uneven_experts_are_padded_with_zeros(tmp_path: Path) -> None:
    assert uneven(tmp_path).findings() == []


def test_one_scaling_may_stand_for_all_trained_experts(tmp_path: Path) -> None:
    adapter = uneven(tmp_path)
    adapter.module["scaling"]["up_proj"] = 4.0
    assert adapter.findings() == []


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("pad", [1.0, -0.0])
def test_a_pad_that_is_not_zero_is_found(tmp_path: Path, pad: float) -> None:
    adapter = uneven(tmp_path)
    name = f"{MODULE}.down_proj.lora_B"

    def fill(tensors: Tensors) -> None:
        tensors[name][0, 4, 1] = pad
        tensors[name][1, 2, 0] = pad

    adapter.edit(RANK_1, fill)
    padded, absent = adapter.findings()
    assert padded.startswith(
        f"{RANK_1}: {name}: expert 1 (slot 0), padded with zeros: [4, 1] is {pad}"
    )
    assert absent.startswith(f"{RANK_1}: {name}: expert 3 (slot 1), not trained: [2, 0] is {pad}")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_rank": 4}, "lora_rank is 4, in the source 2."),
        ({"absent_experts": []}, "absent_experts is [], in the source [3]."),
        ({"expert_lora_ranks": {}}, "down_proj: expert 1 has r 2, in the source 1."),
        ({"scaling": {}}, "scaling names [], not ['down_proj', 'gate_proj', 'up_proj']."),
    ],
)
def test_wrong_module_facts_are_found(
    tmp_path: Path, fields: dict[str, object], expected: str
) -> None:
    adapter = uneven(tmp_path)
    adapter.module.update(fields)
    assert adapter.findings() == [f"lorashard.json: module {MODULE}: {expected}"]


def test_modules_must_be_those_of_the_source(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    adapter.manifest["modules"] = {"other.experts": adapter.module}
    assert adapter.findings() == [
        "lorashard.json: module other.experts is not in the source.",
        f"lorashard.json: module {MODULE} is missing.",
    ]


def test_a_single_pair_of_unknown_orientation_is_not_proven(tmp_path: Path) -> None:
    case = fused_single("down_proj")
    case.options["hidden_size"] = None
    (finding, *_) = build(tmp_path, case).findings()
    assert finding.startswith(f"{MODULE} in the source cannot be read: several readings fit")
    (tmp_path / "again").mkdir()
    case.options["orientation"] = "standard"
    assert build(tmp_path / "again", case).findings() == []


def test_another_expert_count_than_the_config_says_is_not_proven(tmp_path: Path) -> None:
    case = fused()
    case.config["r"] = 2 * R
    (finding, *_) = build(tmp_path, case).findings()
    assert "has r 2 if there are 4 experts, but adapter_config.json says 4." in finding


@pytest.mark.parametrize("leaf", ["1.up_proj.lora_magnitude_vector", "1.up_proj.lora_B.bias"])
def test_an_expert_tensor_of_unknown_kind_is_not_proven(tmp_path: Path, leaf: str) -> None:
    case = per_expert()
    case.tensors[f"{KEY}.{leaf}"] = torch.ones(I)
    expected = f"{KEY}.{leaf} [5] in the source: expert tensor of unknown kind."
    assert build(tmp_path, case).findings() == [expected]


def test_an_expert_with_half_a_pair_is_not_proven(tmp_path: Path) -> None:
    case = per_expert()
    del case.tensors[f"{KEY}.2.up_proj.lora_B.weight"]
    (finding, *_) = build(tmp_path, case).findings()
    assert finding.endswith("up_proj of expert 2 has only one of lora_A and lora_B.")


def test_many_findings_in_one_tensor_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorashard.verify.reference.stacks._MAX_FINDINGS_PER_TENSOR", 1)
    adapter = build(tmp_path, per_expert(), ranks=[[0, 1, 2, 3], [0, 1]])
    name = f"{MODULE}.up_proj.lora_A"
    adapter.edit(RANK_0, lambda tensors: tensors[name].neg_())
    first, rest = adapter.findings()
    assert first.startswith(f"{RANK_0}: {name}: expert 0 (slot 0): ")
    assert rest == f"{RANK_0}: {name}: 3 more differences of this kind."


def test_a_pickle_is_read_only_if_allowed(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    weights = adapter.source / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter.source / "adapter_model.bin")
    weights.unlink()
    assert adapter.findings(allow_pickle=True) == []
    with pytest.raises(UnsupportedAdapterError, match="a pickle"):
        adapter.findings()


def test_a_damaged_pickle_is_an_adapter_error(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    (adapter.source / "adapter_model.safetensors").unlink()
    (adapter.source / "adapter_model.bin").write_bytes(b"no pickle")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        adapter.findings(allow_pickle=True)


def test_values_under_the_name_of_an_empty_tensor_are_found(tmp_path: Path) -> None:
    adapter = build(tmp_path, shared_outer_stacked())
    name = f"{KEY}.w3.lora_A.weight"
    adapter.edit(REPLICATED, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert adapter.findings() == [f"{REPLICATED}: {name} is not a replicated tensor of the source."]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_weights_that_are_a_pipe_are_told_and_not_waited_for(tmp_path: Path, name: str) -> None:
    adapter = build(tmp_path, per_expert())
    (adapter.source / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter.source / name)
    with pytest.raises(AdapterError, match=f"{name}: a pipe or a device, not a file"):
        adapter.findings(allow_pickle=True)


def test_a_source_without_weights_cannot_be_compared(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    (adapter.source / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        adapter.findings()


def test_a_pickled_tensor_of_repeated_elements_is_not_written_out(tmp_path: Path) -> None:
    adapter = build(tmp_path, per_expert())
    weights = adapter.source / "adapter_model.safetensors"
    huge = torch.zeros(1).expand(2**40, R)
    torch.save(load_file(weights) | {ROUTER: huge}, adapter.source / "adapter_model.bin")
    weights.unlink()
    expected = f"{REPLICATED}: {ROUTER}: shape is torch.Size([2, 6]), in the source torch.Size([{2**40}, 2])."
    assert adapter.findings(allow_pickle=True) == [expected]
