"""What made a directory, made again, and every way in which a manifest can contradict it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import ManifestError, ShardError, VerificationError
from lorashard.shards.directory import locate_shards
from lorashard.shards.manifest import Manifest
from lorashard.shards.replan import (
    RebuiltPlan,
    check_shards,
    find_contradictions,
    rebuild_plan,
    source_was_pickled,
)
from tests.tiny import MODULE, RANK_FILES, edit_json, save_adapter, save_fused, save_pickled

GATE_A = f"{MODULE}.gate_proj.lora_A"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def edit(shards: Path, change: Callable[[Any], object]) -> None:
    document = json.loads((shards / "lorashard.json").read_text())
    document.pop("blake3", None)  # the digest of itself, which would tell of every change
    change(document)
    (shards / "lorashard.json").write_text(json.dumps(document))


def rebuilt(shards: Path) -> tuple[Manifest, RebuiltPlan]:
    manifest = locate_shards(shards).manifest
    config = (shards / "adapter_config.json").read_bytes()
    return manifest, rebuild_plan(manifest, config, shards)


def contradictions(shards: Path) -> list[str]:
    return list(find_contradictions(*rebuilt(shards)))


def test_a_manifest_that_was_changed_where_nothing_contradicts_it_is_refused(shards: Path) -> None:
    path = shards / "lorashard.json"
    path.write_text(path.read_text().replace('"repo": null', '"repo": "another/one"'))
    with pytest.raises(ManifestError, match="changed since it was written"):
        check_shards(locate_shards(shards))


@pytest.mark.parametrize("told", [0, 5, None])
def test_the_number_of_experts_is_that_of_the_placement(shards: Path, told: int | None) -> None:
    edit(shards, lambda m: m["options"].update(num_experts=told))
    manifest = locate_shards(shards).manifest
    assert f"options has num_experts {told}, the placement 4" in find_contradictions(manifest, None)


@pytest.mark.parametrize("save", [save_adapter, save_fused])
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_a_manifest_leads_back_to_the_plan_that_was_carried_out(
    tmp_path: Path, save: Callable[[Path], Path], strategy: Any
) -> None:
    request = SplitRequest(ep_size=3, strategy=strategy, dtype="float16")
    split_adapter(save(tmp_path / "adapter"), tmp_path / "out", request)
    manifest, plan = rebuilt(tmp_path / "out")
    assert list(find_contradictions(manifest, plan)) == []
    for file in plan.plan.files:
        content = (tmp_path / "out" / file.name).read_bytes()
        assert (len(content), content[: len(file.header)]) == (file.size_bytes, file.header)


def test_checked_shards_hold_all_that_was_checked(shards: Path) -> None:
    checked = check_shards(locate_shards(shards))
    assert checked.config_bytes == (shards / "adapter_config.json").read_bytes()
    assert [file.name for file in checked.plan.files] == [path.name for path in checked.files]
    assert checked.layout.num_experts == 4


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "ranks": (
        lambda m: m["placement"].update(ranks=[[1, 0], [3, 2]]),
        "the ranks listed are not the linear placement of 4 experts on 2 ranks",
    ),
    "layers": (
        lambda m: m["placement"].update(layers={MODULE: [[1, 0], [3, 2]]}),
        "layers are placed differently, which is not the linear placement of 4 experts on 2 ranks",
    ),
    "scaling": (
        lambda m: m["modules"][MODULE]["scaling"].update(up_proj=7.0),
        f"module {MODULE} is not described as its source has it",
    ),
    "another module": (
        lambda m: m["modules"].update(other=m["modules"][MODULE] | {"scaling": {}}),
        "module other is not described as its source has it",
    ),
    "a missing tensor": (
        lambda m: m["files"][RANK_FILES[0]]["tensors"].pop(GATE_A),
        f"{RANK_FILES[0]}: {GATE_A} is missing",
    ),
    "a tensor of another size": (
        lambda m: m["files"][RANK_FILES[1]]["tensors"][GATE_A].update(shape=[3, 2, 8]),
        f"{RANK_FILES[1]}: {GATE_A} is [3, 2, 8], the placement puts 2 experts on rank 1",
    ),
    "slots of another dtype": (
        lambda m: m["files"][RANK_FILES[1]]["tensors"][GATE_A].update(dtype="F16"),
        f"{RANK_FILES[1]}: {GATE_A} has other slots than on rank 0",
    ),
    "slots of another size": (
        lambda m: m["files"][RANK_FILES[1]]["tensors"][GATE_A].update(shape=[2, 4, 4]),
        f"{RANK_FILES[1]}: {GATE_A} has other slots than on rank 0",
    ),
    "a strange tensor": (
        lambda m: m["files"][RANK_FILES[1]]["tensors"].update(
            x=m["files"][RANK_FILES[1]]["tensors"][GATE_A]
        ),
        f"{RANK_FILES[1]}: x belongs to no module of the manifest",
    ),
    "a moved tensor": (
        lambda m: m["files"][RANK_FILES[0]]["tensors"][GATE_A].update(offset=0),
        f"{RANK_FILES[0]}: its tensors do not follow from the source and the placement",
    ),
    "a replicated tensor": (
        lambda m: m["files"]["replicated.safetensors"]["tensors"].popitem(),
        "replicated.safetensors: its tensors do not follow from the source and the placement",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_contradiction_is_said_once_and_refused(shards: Path, change: str) -> None:
    apply, sentence = CHANGES[change]
    edit(shards, apply)
    assert contradictions(shards) == [sentence]
    with pytest.raises(ManifestError) as refusal:
        check_shards(locate_shards(shards))
    assert sentence in refusal.value.message


def test_without_a_plan_the_manifest_is_still_held_against_itself(shards: Path) -> None:
    edit(shards, CHANGES["a missing tensor"][0])
    manifest = locate_shards(shards).manifest
    assert list(find_contradictions(manifest, None)) == [CHANGES["a missing tensor"][1]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: replace(m, source=replace(m.source, header=m.source.header[:-1])),
        lambda m: replace(m, source=replace(m.source, header=b"")),
        lambda m: replace(m, options=replace(m.options, num_experts=5)),
    ],
    ids=["header cut short", "no header", "another expert count"],
)
def test_a_source_that_cannot_be_read_is_said_not_to_be_described(
    shards: Path, spoil: Callable[[Manifest], Manifest]
) -> None:
    config = (shards / "adapter_config.json").read_bytes()
    with pytest.raises(ManifestError, match="does not describe its source"):
        rebuild_plan(spoil(locate_shards(shards).manifest), config, shards)


def test_another_size_of_the_config_is_refused(shards: Path) -> None:
    size = (shards / "adapter_config.json").stat().st_size
    edit(shards, lambda m: m["source"]["files"]["adapter_config.json"].update(size=size + 1))
    with pytest.raises(
        ManifestError, match=f"adapter_config.json {size + 1} bytes, it has {size}\\b"
    ):
        check_shards(locate_shards(shards))


def test_an_edited_config_is_refused_with_its_name(shards: Path) -> None:
    edit_json(shards / "adapter_config.json", lora_alpha=64)
    with pytest.raises(VerificationError) as refusal:
        check_shards(locate_shards(shards))
    assert refusal.value.findings == (
        f"{shards}/adapter_config.json: BLAKE3 differs from the manifest's",
    )


@pytest.mark.parametrize("name", ["adapter_config.json", RANK_FILES[1]])
def test_a_missing_file_is_refused_with_its_name(shards: Path, name: str) -> None:
    (shards / name).unlink()
    with pytest.raises(ShardError, match=name):
        check_shards(locate_shards(shards))


def test_remote_shards_are_checked_too(shards: Path) -> None:
    assert len(check_shards(locate_shards(shards.as_uri())).files) == 3
    edit(shards, CHANGES["scaling"][0])
    with pytest.raises(ManifestError, match="is not described"):
        check_shards(locate_shards(shards.as_uri()))


def test_a_pickled_source_is_remembered(shards: Path, tmp_path: Path) -> None:
    assert not source_was_pickled(locate_shards(shards).manifest)
    request = SplitRequest(ep_size=2, allow_pickle=True)
    split_adapter(save_pickled(tmp_path / "pickled"), tmp_path / "2", request)
    assert source_was_pickled(locate_shards(tmp_path / "2").manifest)


def test_a_placement_of_an_unknown_module_is_a_contradiction(tmp_path: Path) -> None:
    expert_map = tmp_path / "map.json"
    permuted = [[3, 2], [1, 0]]
    default = [[0, 1], [2, 3]]
    expert_map.write_text(json.dumps({"ranks": default, "layers": {MODULE: permuted}}))
    out = tmp_path / "explicit"
    split_adapter(
        save_adapter(tmp_path / "source"), out, SplitRequest(ep_size=2, expert_map=expert_map)
    )
    check_shards(locate_shards(out))
    unknown = MODULE[:-1] + "z"
    edit(out, lambda m: m["placement"].update(layers={unknown: permuted}))
    with pytest.raises(ManifestError, match="which is no module of the manifest") as raised:
        check_shards(locate_shards(out))
    assert unknown in raised.value.message


GPT_OSS = "openai/gpt-oss-20b"


def split_fused(tmp_path: Path, base_model: str | None, *, stated: bool = False) -> Path:
    """Shards of a fused adapter; stated: whether --model says that it is a gpt-oss."""
    adapter = save_fused(tmp_path / "adapter", base_model_name_or_path=base_model)
    model = tmp_path / "config.json"
    model.write_text('{"model_type": "gpt_oss", "num_experts": 4}')
    split_adapter(adapter, tmp_path / "out", SplitRequest(2, model=model if stated else None))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("base_model", "stated"), [(None, True), ("/ckpt/step_400", True), (GPT_OSS, False)]
)
def test_a_gate_up_known_that_is_proven_cannot_be_flipped(
    tmp_path: Path, base_model: str | None, stated: bool
) -> None:
    out = split_fused(tmp_path, base_model, stated=stated)
    assert locate_shards(out).manifest.gate_up_known
    assert contradictions(out) == []
    edit(out, lambda d: d["options"].update(gate_up_known=False))
    (found,) = contradictions(out)
    assert found.startswith("options.gate_up_known is false, which does not follow")
    with pytest.raises(ManifestError, match=r"options\.gate_up_known"):
        check_shards(locate_shards(out))


def test_a_gate_up_known_of_separate_projections_cannot_be_flipped(shards: Path) -> None:
    edit(shards, lambda d: d["options"].update(gate_up_known=False))
    (found,) = contradictions(shards)
    assert found.startswith("options.gate_up_known is false, which does not follow")


@pytest.mark.parametrize("order", ["concatenated", "interleaved"])
@pytest.mark.parametrize("base_model", [None, "/ckpt/global_step_400", "/models/gpt-oss"])
def test_an_order_that_an_earlier_release_took_from_a_path_is_as_recorded(
    tmp_path: Path, base_model: str | None, order: str
) -> None:
    out = split_fused(tmp_path, base_model)
    assert not locate_shards(out).manifest.gate_up_known
    edit(out, lambda d: d["options"].update(gate_up_known=True))
    edit(out, lambda d: d["modules"][MODULE].update(gate_up=order))
    checked = check_shards(locate_shards(out))
    assert checked.layout.gate_up_known
    assert [module.gate_up for module in checked.layout.modules] == [order]


@pytest.mark.parametrize("known", [False, True])
def test_an_order_against_what_is_proven_or_assumed_is_a_contradiction(
    tmp_path: Path, known: bool
) -> None:
    out = split_fused(tmp_path, GPT_OSS if known else None)
    wrong = "concatenated" if known else "interleaved"
    edit(out, lambda d: d["modules"][MODULE].update(gate_up=wrong))
    assert contradictions(out) == [f"module {MODULE} is not described as its source has it"]
