"""Converted is the same adapter: every expert's factors and scaling, or nothing is written at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lorashard import SplitRequest, convert_shards, split_adapter, verify_shards
from lorashard.convert import convert
from lorashard.convert.tensor_blocks import read_tensor_blocks
from lorashard.errors import AdapterError, LayoutError, ManifestError, ShardError, VerificationError
from lorashard.writing.restore import proof_bytes
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Spec, build
from tests.coded_values import bits
from tests.conversions import (
    PEFT_LAYOUTS,
    Work,
    assert_same_deltas,
    deltas,
    refused,
    wrong_pairs,
)
from tests.goldens import check_golden
from tests.imports import RUN, imported_by
from tests.strategies import rank_lists, specs
from tests.tiny import (
    MODULE,
    RANK_FILES,
    contents,
    edit_json,
    flip_bit,
    run_cli,
    split_wrongly_placed,
)

CASES = [Spec(layout) for layout in LAYOUTS] + [Spec(x, gated=False) for x in NON_GATED_LAYOUTS]
CASES += [Spec("L1", lora_ranks={1: 0})]
case_name = "{0.layout}-gated={0.gated}-{0.lora_ranks}".format
run = settings(max_examples=40, deadline=None)

Pairs = dict[tuple[str, int, str], tuple[Tensor, Tensor]]  # (module, expert, projection)


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


PARTIAL = Spec("L1", num_experts=128, experts=(0, *range(50, 90), 127), lora_ranks={60: 1})


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
@pytest.mark.parametrize(
    "spec", [PARTIAL, *(Spec(name, num_experts=128) for name in LAYOUTS)], ids=lambda s: s.layout
)
def test_each_layout_is_converted_at_the_size_of_a_real_model(
    tmp_path: Path, spec: Spec, layout: str
) -> None:
    if layout == "fused":  # holds one scaling for all experts
        spec = replace(spec, lora_ranks={})
    work = Work(tmp_path, build(replace(spec, fill="random", extras=True))).split()
    work.convert(layout)
    assert wrong_pairs(work, layout) == []
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))


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


@pytest.mark.parametrize(("spec", "layout"), [(Spec("L1"), "per_expert"), (Spec("L2"), "fused")])
def test_an_adapter_of_many_batches_comes_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Spec, layout: str
) -> None:
    monkeypatch.setattr(convert, "BLOCK_BYTES", 100)
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
    refusal = refused(shards, "per_expert", ShardError)
    is_rank_file = name.startswith("ep-")
    named = (
        f"{shards}: 1 of 2 rank files is not here ({name})"
        if is_rank_file
        else f"{shards / name}: "
    )
    assert named in refusal


def test_an_edited_config_or_manifest_is_refused(shards: Path) -> None:
    manifest = json.loads((shards / "lorashard.json").read_text())
    manifest["modules"][MODULE]["scaling"]["gate_proj"] = 7.0
    (shards / "lorashard.json").write_text(json.dumps(manifest))
    assert "describe" in refused(shards, "fused", ManifestError)
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    assert "adapter_config.json: BLAKE3 differs" in refused(shards, "fused", VerificationError)


def test_force_replaces_an_adapter_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    convert_shards(shards, tmp_path / "out", "fused")
    with pytest.raises(ShardError, match="`force=True` replaces it"):
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
    (shards / "adapter_model.safetensors").unlink()  # the notice is not read
    proven = proof_bytes(prepared.manifest)
    assert proven > 0
    assert sum(seen) == size + proven + sum(f.stat().st_size for f in shards.glob("*.safetensors"))


def test_a_placement_that_is_not_that_of_the_data_is_refused(tmp_path: Path) -> None:
    shards = split_wrongly_placed(tmp_path)
    for layout in PEFT_LAYOUTS:
        with pytest.raises(VerificationError, match="with this placement, the shards hold another"):
            convert_shards(shards, tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()


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
