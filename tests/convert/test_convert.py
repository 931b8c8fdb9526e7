"""Converted is the same adapter: every expert's factors and scaling, or nothing is written at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lorashard import (
    LayoutOptions,
    LorashardError,
    SplitRequest,
    convert_shards,
    split_adapter,
    verify_shards,
)
from lorashard.convert.scaling import find_alpha
from lorashard.convert.tensor_blocks import read_tensor_blocks
from lorashard.errors import AdapterError, LayoutError, ManifestError, ShardError, VerificationError
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Adapter, Spec, build
from tests.coded_values import bits
from tests.deltas import expert_deltas
from tests.goldens import check_golden
from tests.imports import RUN, imported_by
from tests.strategies import rank_lists, specs
from tests.tiny import (
    MODULE,
    RANK_FILES,
    REPO,
    contents,
    edit_json,
    flip_bit,
    fused_tensors,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_fused,
)
from tests.vllm_release import run_in_release

CASES = [Spec(layout) for layout in LAYOUTS] + [Spec(x, gated=False) for x in NON_GATED_LAYOUTS]
PEFT_LAYOUTS = ("per_expert", "fused")
LEGACY = Path(os.environ.get("LORASHARD_LEGACY", REPO / ".venv" / "legacy"))
case_name = "{0.layout}-gated={0.gated}".format
run = settings(max_examples=40, deadline=None)

Pairs = dict[tuple[str, int, str], tuple[Tensor, Tensor]]  # (module, expert, projection)


class Work:
    """One adapter in a folder, split and converted. model: what --model is told, None = nothing."""

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


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
@pytest.mark.parametrize("spec", CASES, ids=case_name)
def test_each_layout_keeps_every_bit_of_every_factor(
    tmp_path: Path, spec: Spec, layout: str
) -> None:
    work = Work(tmp_path, build(replace(spec, num_layers=2, extras=True, fill="bits")))
    work.split(ranks=[[2, 0], [1, 0, 3], []]).convert(layout)
    assert wrong_pairs(work, layout) == []
    written = load_file(work.out / "adapter_model.safetensors")
    for name, tensor in work.adapter.replicated.items():
        assert torch.equal(bits(written[name]), bits(tensor)), name


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
@pytest.mark.parametrize("spec", CASES, ids=case_name)
def test_each_layout_keeps_every_weight_change(tmp_path: Path, spec: Spec, layout: str) -> None:
    spec = replace(spec, fill="random", rslora=True, lora_rank=3)
    work = Work(tmp_path, build(spec)).split().convert(layout)
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))
    assert verify_shards(work.split_again(), against=work.out) == ()


def has_several_scalings(module: Mapping[str, Any]) -> bool:
    """Experts with an r of their own have a scaling of their own, at one alpha."""
    trained = {
        projection: set(scaling) - {0.0} if isinstance(scaling, list) else {scaling}
        for projection, scaling in module["scaling"].items()
    }
    down = trained.pop("down_proj", set())
    return len(down) > 1 or len(set().union(*trained.values())) > 1


@given(
    data=st.data(), layout=st.sampled_from(PEFT_LAYOUTS), block_bytes=st.sampled_from([None, 1, 40])
)
@run
def test_any_adapter_is_converted_right(
    data: st.DataObject, layout: str, block_bytes: int | None
) -> None:
    spec = data.draw(specs(fill="random"))
    ep_size = data.draw(st.integers(1, 5))
    ranks = data.draw(rank_lists(spec.num_experts, ep_size)) if data.draw(st.booleans()) else None
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if block_bytes:
            patch.setattr(read_tensor_blocks, "__defaults__", (block_bytes, block_bytes))
        work = Work(Path(name), build(spec))
        work.split(ep_size, ranks and {"ranks": ranks})
        before = json.loads((work.shards / "lorashard.json").read_bytes())["modules"]
        if layout == "fused" and any(map(has_several_scalings, before.values())):
            with pytest.raises(LayoutError, match="scalings"):
                work.convert(layout)
            assert not work.out.exists()
            return
        work.convert(layout)
        assert wrong_pairs(work, layout) == []
        assert_same_deltas(deltas(work.shards), deltas(work.split_again()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_cast_shards_are_converted_as_they_are(tmp_path: Path, layout: str, dtype: str) -> None:
    work = Work(tmp_path, build(Spec("L3", fill="random", extras=True))).split(dtype=dtype)
    work.convert(layout)
    written = load_file(work.out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))


def test_a_placement_of_its_own_for_a_layer_is_followed(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L13", num_layers=2)))
    layers = {"1": [[3, 0], [2], [1, 3]]}
    work.split(ranks={"ranks": [[2, 0], [1, 0, 3], []], "layers": layers}).convert("per_expert")
    assert wrong_pairs(work, "per_expert") == []


SAME = [
    (Spec("L1"), "per_expert"), (Spec("L1-w"), "per_expert"), (Spec("L1", gated=False), "per_expert"),
    (Spec("L1", lora_ranks={0: 3, 2: 1}), "per_expert"), (Spec("L1", rslora=True), "per_expert"),
    (Spec("L1", projections=("down_proj",)), "per_expert"),
    (Spec("L2"), "fused"), (Spec("L2b"), "fused"), (Spec("L2", gated=False), "fused"),
    (Spec("L4-gate_up"), "fused"), (Spec("L4-down"), "fused"), (Spec("L2", rslora=True), "fused"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "layout"), SAME, ids=lambda x: getattr(x, "layout", x))
def test_an_adapter_that_has_the_layout_comes_back_byte_for_byte(
    tmp_path: Path, spec: Spec, layout: str
) -> None:
    work = Work(tmp_path, build(replace(spec, num_layers=2, fill="bits", extras=True)))
    work.split().convert(layout)
    assert contents(work.out) == contents(work.source)


def test_llama_4_comes_back_transposed(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L3", extras=True)), "llama4_text").split().convert("fused")
    assert contents(work.out) == contents(work.source)


def test_fused_and_back_is_where_it_began(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L2", fill="bits"))).split().convert("per_expert")
    split_adapter(work.out, tmp_path / "between", SplitRequest(3))
    # Gate and up have one lora_A, so the pair's rank is not doubled.
    convert_shards(tmp_path / "between", tmp_path / "back", "fused", model=work.model)
    one, two = (
        contents(path)["adapter_model.safetensors"] for path in (work.source, tmp_path / "back")
    )
    assert one == two


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_interleaved_rows_are_those_of_gpt_oss(tmp_path: Path, layout: str) -> None:
    source = "L2" if layout == "per_expert" else "L10"
    work = Work(tmp_path, build(Spec(source, fill="random")), "gpt_oss").split().convert(layout)
    for module, expert, projection in work.adapter.factors:
        _, b = work.adapter.factors[module, expert, projection]
        if projection in ("gate_proj", "up_proj"):
            rows = work.pairs()[module, expert, "gate_up_proj"][1][projection == "up_proj" :: 2]
            assert torch.equal(rows[:, 2 * (projection == "up_proj") :][:, :2], b)
        elif projection == "gate_up_proj":
            assert torch.equal(work.pairs()[module, expert, "gate_proj"][1], b[0::2])
            assert torch.equal(work.pairs()[module, expert, "up_proj"][1], b[1::2])


@pytest.mark.parametrize("half", ["gate_proj", "up_proj"])
def test_the_half_that_is_not_trained_is_zero(tmp_path: Path, half: str) -> None:
    work = Work(tmp_path, build(Spec("L1", projections=(half,)))).split().convert("fused")
    tensors = load_file(work.out / "adapter_model.safetensors")
    b = tensors[f"base_model.model.{MODULE}.lora_B.weight"]
    trained, other = b.chunk(2) if half == "gate_proj" else reversed(b.chunk(2))
    assert trained.all()
    assert not other.any()


def config_of(work: Work) -> dict[str, Any]:
    return json.loads((work.out / "adapter_config.json").read_text())


def test_experts_get_one_pattern_where_they_are_alike(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L1", extras=True))).split().convert("fused")
    config = config_of(work)
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"experts\.gate_up_proj": 4}
    assert config["alpha_pattern"] == {r"experts\.gate_up_proj": 8}
    # PEFT >= 0.19 takes `gate` and `up_proj` among target_modules for the routed experts.
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["target_parameters"] == [
        "gate.weight", "model.layers.0.mlp.shared_expert.up_proj.weight",
        "experts.gate_up_proj", "experts.down_proj",
    ]  # fmt: skip


def test_patterns_for_other_modules_stay_theirs(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {r".*\.experts\.1\..*": 3, r".*_proj": 2},
        "alpha_pattern": {r".*\.experts\.1\..*": 6, r"q_proj": 7, r".*_proj": 5},
    }
    spec = Spec("L1", lora_ranks={1: 3}, extras=True, config=patterns, fill="random")
    work = Work(tmp_path, build(spec)).split().convert("per_expert")
    assert contents(work.out) == contents(work.source)
    spec = replace(spec, layout="L2", lora_ranks={}, config={"alpha_pattern": {r".*_proj": 5}})
    work = Work(tmp_path / "fused", build(spec)).split().convert("per_expert")
    config = config_of(work)
    assert list(config["alpha_pattern"].items()) == [
        (r"experts\.\d+\.gate_proj", 5), (r"experts\.\d+\.up_proj", 5),
        (r"experts\.\d+\.down_proj", 5), (r".*_proj", 5),
    ]  # fmt: skip
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))


def test_what_other_layouts_say_in_the_config_is_dropped(tmp_path: Path) -> None:
    config = {"lora_dropout": 0.1, "init_lora_weights": False, "layers_to_transform": [0]}
    work = Work(tmp_path, build(Spec("L6", extras=True, config=config))).split().convert("fused")
    written = config_of(work)
    assert "lora_B_layout" not in written
    assert written["lora_dropout"] == 0.0
    assert written["init_lora_weights"] is True
    assert written["layers_to_transform"] is None


@given(
    alpha=st.integers(1, 10**6) | st.floats(0.01, 1e6),
    lora_rank=st.integers(1, 512),
    use_rslora=st.booleans(),
)
def test_an_alpha_is_found_for_every_scaling_that_has_one(
    alpha: float, lora_rank: int, use_rslora: bool
) -> None:
    divisor = lora_rank**0.5 if use_rslora else lora_rank
    found = find_alpha(alpha / divisor, lora_rank, use_rslora=use_rslora)
    assert found is not None
    assert found / divisor == alpha / divisor
    if isinstance(alpha, int):
        assert found == alpha
    twice = find_alpha(alpha / lora_rank, 2 * lora_rank, use_rslora=False)
    assert twice is not None
    assert Fraction(twice) == 2 * Fraction(alpha) or twice / (2 * lora_rank) == alpha / lora_rank


def test_doubling_the_rank_keeps_the_scaling_of_rslora(tmp_path: Path) -> None:
    for lora_rank in range(1, 9):
        spec = Spec("L1", rslora=True, lora_rank=lora_rank)
        work = Work(tmp_path / str(lora_rank), build(spec)).split().convert("fused")
        manifest = json.loads((work.split_again() / "lorashard.json").read_bytes())
        before = json.loads((work.shards / "lorashard.json").read_bytes())
        scaling = {s for m in before["modules"].values() for s in m["scaling"].values()}
        assert {s for m in manifest["modules"].values() for s in m["scaling"].values()} == scaling


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Per-expert shards on two ranks."""
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def _nothing_half_done(tmp_path: Path) -> Iterator[None]:
    yield
    assert [name for name in os.listdir(tmp_path) if "lorashard" in name] == []


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


UNNAMED = {"base_model_name_or_path": None}


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_the_order_of_gate_and_up_is_not_guessed(tmp_path: Path, layout: str) -> None:
    source = fused_tensors() if layout == "per_expert" else per_expert_tensors()
    adapter = save_adapter(tmp_path / "adapter", source, **UNNAMED)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    message = refused(tmp_path / "shards", layout)
    assert message.startswith(f"{MODULE}: ")
    assert "--model" in message
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 4}')
    convert_shards(tmp_path / "shards", tmp_path / "out", layout, model=tmp_path / "config.json")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_what_the_split_was_told_is_known(tmp_path: Path, layout: str) -> None:
    source = fused_tensors() if layout == "per_expert" else per_expert_tensors()
    adapter = save_adapter(tmp_path / "adapter", source, **UNNAMED)
    options = LayoutOptions(gate_up="concatenated")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2, options=options))
    convert_shards(tmp_path / "shards", tmp_path / "out", layout)  # type: ignore[arg-type]


def test_whether_up_alone_has_a_gate_is_not_guessed(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L1", gated=False, config={
        "base_model_name_or_path": "some/nemotron-h"
    }))).split()  # fmt: skip
    assert "not known whether the experts have a gate" in refused(work.shards, "fused")


def test_which_way_round_a_feed_forward_lies_is_not_guessed(tmp_path: Path) -> None:
    tensors = {
        name.replace(".mlp.", ".feed_forward."): t for name, t in per_expert_tensors().items()
    }
    adapter = save_adapter(tmp_path / "adapter", tensors, **UNNAMED)
    options = LayoutOptions(gate_up="concatenated")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2, options=options))
    assert "--orientation" in refused(tmp_path / "shards", "fused")
    convert_shards(tmp_path / "shards", tmp_path / "llama", "fused", orientation="transposed")
    tensors = load_file(tmp_path / "llama" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.feed_forward.experts.base_layer.lora_A.weight"
    assert tensors[key].shape == (4 * 4, 12)  # [E * 2r, 2I]


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"up_proj": 9}},
        {"alpha_pattern": {r"experts\.3\.down_proj": 9}},
        {"alpha_pattern": {r"experts\.3\..*": 9}},
    ],
)
def test_scalings_that_differ_cannot_be_fused(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save_adapter(tmp_path / "adapter", **config)
    split_adapter(adapter, tmp_path / "shards", SplitRequest(2))
    message = refused(tmp_path / "shards", "fused")
    assert "have the scalings 2, 4.5" in message
    assert "Convert to per_expert" in message
    convert_shards(tmp_path / "shards", tmp_path / "out", "per_expert")


def test_dtypes_that_differ_cannot_be_fused(tmp_path: Path) -> None:
    tensors = {n: t.float() if "gate_proj" in n else t for n, t in per_expert_tensors().items()}
    split_adapter(save_adapter(tmp_path / "adapter", tensors), tmp_path / "shards", SplitRequest(2))
    assert "gate_proj and up_proj are BF16 and F32" in refused(tmp_path / "shards", "fused")


def test_halves_of_two_sizes_cannot_be_fused(tmp_path: Path) -> None:
    tensors = {
        name: tensor[:4].clone() if "gate_proj.lora_B" in name else tensor
        for name, tensor in per_expert_tensors().items()
    }
    split_adapter(save_adapter(tmp_path / "adapter", tensors), tmp_path / "shards", SplitRequest(2))
    assert "differ in size" in refused(tmp_path / "shards", "fused")


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_a_model_without_gates_contradicts_them(tmp_path: Path, layout: str) -> None:
    source = save_fused if layout == "per_expert" else save_adapter
    split_adapter(source(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h", "num_experts": 4}')
    assert "no gate" in refused(tmp_path / "shards", layout, model=tmp_path / "config.json")


def test_a_model_with_another_number_of_experts_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8}')
    assert "8 experts" in refused(shards, "fused", AdapterError, model=tmp_path / "config.json")


def test_a_layout_that_is_none_is_refused(shards: Path) -> None:
    assert "per_expert, fused" in refused(shards, "stacked", AdapterError)


@pytest.mark.parametrize("name", ["replicated.safetensors", *RANK_FILES])
def test_a_flipped_bit_in_any_file_is_refused(shards: Path, name: str) -> None:
    flip_bit(shards / name, -2)
    message = refused(shards, "fused", VerificationError)
    assert f"{shards / name}: BLAKE3 differs from the manifest's" in message


@pytest.mark.parametrize("name", [*RANK_FILES, "adapter_config.json", "lorashard.json"])
def test_a_missing_file_is_named(shards: Path, name: str) -> None:
    (shards / name).unlink()
    assert f"{shards / name}: " in refused(shards, "per_expert", ShardError)


def test_an_edited_config_or_manifest_is_refused(shards: Path) -> None:
    manifest = json.loads((shards / "lorashard.json").read_text())
    manifest["modules"][MODULE]["scaling"]["gate_proj"] = 7.0
    (shards / "lorashard.json").write_text(json.dumps(manifest))
    assert "describe" in refused(shards, "fused", ManifestError)
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    assert "adapter_config.json: BLAKE3 differs" in refused(shards, "fused", VerificationError)


def test_force_replaces_an_adapter_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    convert_shards(shards, tmp_path / "out", "fused")
    with pytest.raises(ShardError, match="--force replaces it"):
        convert_shards(shards, tmp_path / "out", "per_expert")
    convert_shards(shards, tmp_path / "out", "per_expert", force=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "adapter")
    with pytest.raises(ShardError, match="not what lorashard would write"):
        convert_shards(shards, shards, "fused", force=True)


def test_progress_adds_up_to_what_is_digested_and_written(shards: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    prepared = convert_shards(shards, tmp_path / "out", "fused", progress=seen.append)
    assert sum(seen) == prepared.progress_bytes
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert sum(seen) == size + sum(f.stat().st_size for f in shards.glob("*.safetensors"))


def test_converting_needs_no_torch(shards: Path, tmp_path: Path) -> None:
    told = ("-o", tmp_path / "out", "--layout", "fused")
    assert imported_by(RUN, "convert", shards, *told) & {"torch", "vllm"} == set()


def test_the_command_prints_where_it_wrote(shards: Path, tmp_path: Path) -> None:
    done = run_cli("convert", shards, "-o", tmp_path / "out", "--layout", "fused")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out\n")
    assert done.stderr == f"{shards}: 4 experts in 1 modules, fused, 1.7 kB\n"
    done = run_cli("convert", shards, "-o", tmp_path / "2", "--layout", "fused", "--json", "-q")
    check_golden("convert", done.stdout, tmp_path)
    assert done.stderr == ""


NOTES = [
    (Spec("L1", experts=(0,)), "per_expert", "qwen3_moe", "written as zeros"),
    (Spec("L1", rslora=True), "per_expert", "qwen3_moe", "rsLoRA"),
    (Spec("L2b"), "per_expert", "qwen3_moe", "that have their own"),
    (Spec("L2"), "per_expert", "gpt_oss", "silently leave them out"),
    (Spec("L2", extras=True), "per_expert", "mixtral", "gate.lora_A.weight keeps its name"),
    (Spec("L4-down"), "fused", "qwen3_moe", "trains down_proj only"),
]


@pytest.mark.parametrize(("spec", "layout", "model_type", "told"), NOTES)
def test_a_note_says_who_does_not_read_it_right(
    tmp_path: Path, spec: Spec, layout: Any, model_type: str, told: str
) -> None:
    work = Work(tmp_path, build(spec), model_type).split()
    prepared = convert_shards(work.shards, work.out, layout, model=work.model)
    assert sum(told in note for note in prepared.conversion.notes) == 1


def test_mixtral_s_experts_are_called_as_mixtral_s(tmp_path: Path) -> None:
    work = Work(tmp_path, build(Spec("L2")), "mixtral").split().convert("per_expert")
    names = load_file(work.out / "adapter_model.safetensors")
    block = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert {f"{block}.3.{leaf}.lora_A.weight" for leaf in ("w1", "w2", "w3")} <= set(names)


# The real PEFT: a tiny GLM-4-MoE with attention, router and shared experts.

GLM = {
    "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
ONE_SCALING = {"alpha_pattern": {r"experts\.1\.\w+": 6}}  # for r=3 the same as 4 for r=2
FOR_PEFT = {
    "L1": Spec("L1"),
    "L1-rslora": Spec("L1", rslora=True, lora_rank=3),
    "L1-some": Spec("L1", experts=(0, 2), config={"init_lora_weights": False}),
    "L1-ranks": Spec("L1", lora_ranks={1: 3}, config=ONE_SCALING),
    "L1-down": Spec("L1", projections=("down_proj",)),
    "L2": Spec("L2"), "L2b": Spec("L2b"), "L3": Spec("L3"), "L6": Spec("L6"), "L8": Spec("L8"),
    "L10": Spec("L10"), "L11": Spec("L11"), "L13": Spec("L13"),
}  # fmt: skip


def glm_adapter(spec: Spec) -> Adapter:
    """With factors for all that GLM-4-MoE has beside its experts."""
    adapter = build(replace(
        spec, hidden=64, intermediate=48, num_layers=2, fill="random", extras=True
    ))  # fmt: skip
    tensors = {}
    for name, tensor in adapter.tensors.items():
        rows = (
            torch.randn(48, tensor.shape[1]) if "shared_expert.up_proj.lora_B" in name else tensor
        )
        tensors[name.replace("shared_expert.", "shared_experts.")] = rows
    # As PEFT would have it; another writer's would be made anew.
    config = adapter.config | {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    config["target_parameters"] = [*(config["target_parameters"] or ()), "gate.weight"]
    if spec.layout == "L1":
        config["target_modules"] += [f"experts.{e}.{p}" for _, e, p in adapter.factors]
        config["target_modules"] += ["shared_experts.up_proj"]
    else:
        config["target_parameters"] += ["shared_experts.up_proj.weight"]
    return replace(adapter, tensors=tensors, config=config)


@pytest.fixture(scope="module", params=PEFT_LAYOUTS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Work]]:
    """Each adapter converted, and loaded by the PEFT that reads this layout."""
    environment = dict(os.environ)
    if request.param == "per_expert":
        if not LEGACY.is_dir():
            assert "LORASHARD_REQUIRE_ALL" not in os.environ, f"{LEGACY} is missing"
            pytest.skip(f"{LEGACY} is missing; `make test` makes it")
        environment["PYTHONPATH"] = str(LEGACY)
    else:
        pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    works = {name: Work(folder / name, glm_adapter(spec)) for name, spec in FOR_PEFT.items()}
    for work in works.values():
        model = Path(f"{work.out}.model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(GLM))
        work.split().convert(request.param, model=model)
    script = REPO / "tests" / "families" / "load_adapters.py"
    done = subprocess.run(
        [sys.executable, str(script), *(str(work.out) for work in works.values())],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, works


@pytest.mark.parametrize("name", FOR_PEFT)
def test_peft_computes_the_weight_changes_of_the_shards(
    loaded: tuple[str, dict[str, Work]], name: str
) -> None:
    work = loaded[1][name]
    computed = load_file(f"{work.out}.deltas.safetensors")
    experts = {key: delta for key, delta in computed.items() if key.startswith("experts|")}
    wanted = deltas(work.shards)
    for key in wanted.keys() | experts.keys():
        if key not in wanted or key not in experts:  # the other half of a pair, for example
            assert not (wanted.get(key, experts.get(key))).any(), key  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(experts[key], wanted[key].float(), rtol=1e-5, atol=1e-5)
    scaling = work.adapter.config["lora_alpha"] / (
        work.adapter.spec.lora_rank ** (0.5 if work.adapter.spec.rslora else 1)
    )
    others = {
        module: scaling * work.adapter.tensors[f"{module}.lora_B.weight"] @ a
        for module, a in (
            (tensor_name.removesuffix(".lora_A.weight"), tensor)
            for tensor_name, tensor in work.adapter.tensors.items()
        )
        if ".experts" not in module and f"{module}.lora_A.weight" in work.adapter.tensors
    }
    assert len(others) == 6
    for module, delta in others.items():
        key = f"module|{module.removeprefix('base_model.model.')}"
        found = computed.get(key, computed.get(f"{key}.weight"))
        assert found is not None, key
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)
    assert len(computed) - len(experts) == 6


@pytest.mark.parametrize("name", FOR_PEFT)
def test_peft_misses_nothing(loaded: tuple[str, dict[str, Work]], name: str) -> None:
    said = json.loads(Path(f"{loaded[1][name].out}.json").read_text())
    # PEFT 0.21 looks for patterns of parameters among modules, says that they are ignored, and
    # follows them; of a router that is no nn.Linear it says that of any adapter.
    allowed = ("keys did not match any targeted module", "Unsupported layer type", "deprecated")
    assert [text for text in said if not any(part in text for part in allowed)] == []


LOAD_IN_VLLM = f"""
import sys
sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests" / "vllm_plugin")!r}]
from pathlib import Path
from tests.vllm_plugin import harness_selfcheck as check
from lorashard import SplitRequest, convert_shards, split_adapter

problems = {{}}
for layout in ("L1", "L2", "L3", "L6", "L8", "L10", "L13"):
    adapter = check.adapter_of(layout)
    work = check.write(adapter).parent / layout
    split_adapter(adapter.write(work / "source"), work / "shards", SplitRequest(3))
    model = work / "config.json"
    model.write_text('{{"model_type": "qwen3_moe", "num_experts": %d}}' % check.EXPERTS)
    convert_shards(work / "shards", work / "out", "per_expert", model=model)
    problems[layout] = []
    for ep_rank in (0, 1):
        engine = check.harness.make_engine(
            **check.SIZES, ep_size=2, ep_rank=ep_rank, module_names=check.modules()
        )
        assert engine.add_adapter(check.harness.request(engine, work / "out"))
        slot, expected = check.harness.slot_of(engine, 1), check.expected_deltas(adapter)
        problems[layout] += check.mismatches(engine, slot, expected)
        problems[layout] += check.wrong_attention(engine, slot, adapter)
answer(problems)
"""


def test_vllm_alone_reads_the_per_expert_layout() -> None:
    problems = run_in_release("0.33.0", LOAD_IN_VLLM)
    assert len(problems) == 7
    assert [problem for found in problems.values() for problem in found] == []
