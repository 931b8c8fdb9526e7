"""What is decided before a split writes anything, and the manifest that it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from blake3 import blake3

from lorashard import LayoutOptions, SplitRequest
from lorashard.errors import AdapterError, PlacementError
from lorashard.split.pipeline import prepared_split, write_shards
from tests.tiny import (
    FUSED_CONFIG,
    MODULE,
    contents,
    fused_tensors,
    save_adapter,
    save_pickled,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


def notes(adapter: Path, request: SplitRequest) -> tuple[str, ...]:
    with prepared_split(adapter, request) as prepared:
        return prepared.notes


def test_preparing_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with prepared_split(adapter, SplitRequest(ep_size=2)) as prepared:
        assert prepared.placement.ranks == ((0, 1), (2, 3))
        assert len(prepared.plan.files) == 3
    assert contents(tmp_path) == before


def test_the_number_of_experts_that_was_found_is_in_the_options(adapter: Path) -> None:
    with prepared_split(adapter, SplitRequest(ep_size=2)) as prepared:
        assert prepared.options.num_experts == 4


def test_ranks_without_experts_are_noted(adapter: Path) -> None:
    assert notes(adapter, SplitRequest(ep_size=2)) == ()
    assert notes(adapter, SplitRequest(ep_size=6)) == ("2 of 6 ranks hold no expert.",)


def test_a_placement_that_vllm_would_not_use_is_noted(adapter: Path, tmp_path: Path) -> None:
    model = tmp_path / "config.json"
    facts = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 8,
             "moe_intermediate_size": 6}  # fmt: skip
    model.write_text(json.dumps(facts))
    (note,) = notes(adapter, SplitRequest(ep_size=2, strategy="round_robin", model=model))
    assert "vLLM places the experts of qwen3_moe linearly" in note
    model.write_text(json.dumps(facts | {"n_group": 2}))
    assert notes(adapter, SplitRequest(ep_size=2, strategy="round_robin", model=model)) == ()


def test_an_unnamed_base_model_of_a_fused_adapter_is_noted(tmp_path: Path) -> None:
    unnamed = FUSED_CONFIG | {"base_model_name_or_path": "somebody/mystery"}
    adapter = save_adapter(tmp_path / "adapter", fused_tensors(), **unnamed)
    (note,) = notes(adapter, SplitRequest(ep_size=2))
    assert note.startswith("Neither the adapter nor `model` says what the base model is")


def test_an_expert_map_takes_precedence_over_the_strategy(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"ranks": [[3, 0], [1, 2]]}')
    request = SplitRequest(ep_size=2, strategy="round_robin", expert_map=tmp_path / "map.json")
    with prepared_split(adapter, request) as prepared:
        assert prepared.placement.strategy == "explicit"
        assert prepared.placement.ranks == ((3, 0), (1, 2))


@pytest.mark.parametrize("option", ["model", "expert_map"])
def test_an_option_that_names_a_pipe_or_an_endless_device_is_refused(
    adapter: Path, tmp_path: Path, option: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(AdapterError, match="a pipe or a device, not a file"):
            notes(adapter, SplitRequest(ep_size=2, **{option: place}))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (SplitRequest(ep_size=2, dtype="int8"), AdapterError),
        (SplitRequest(ep_size=0), PlacementError),
        (SplitRequest(ep_size=2, strategy="random"), PlacementError),  # type: ignore[arg-type]
        (SplitRequest(ep_size=2, options=LayoutOptions(num_experts=3)), AdapterError),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    adapter: Path, request_: SplitRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        notes(adapter, request_)


def test_the_manifest_records_the_source_and_the_cast(adapter: Path, tmp_path: Path) -> None:
    request = SplitRequest(ep_size=2, dtype="float16")
    with prepared_split(adapter, request) as prepared:
        manifest = write_shards(
            prepared, tmp_path / "out", request, force=False, progress=lambda _: None
        )
    assert manifest.dtype == "F16"
    assert tuple(manifest.modules) == (MODULE,)
    for name, digest in manifest.source.files.items():
        content = (adapter / name).read_bytes()
        assert (digest.size_bytes, digest.blake3) == (len(content), blake3(content).hexdigest())
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        adapter / "adapter_config.json"
    ).read_bytes()


def test_the_manifest_of_a_pickle_records_the_pickle_too(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    request = SplitRequest(ep_size=2, allow_pickle=True)
    with prepared_split(adapter, request) as prepared:
        manifest = write_shards(
            prepared, tmp_path / "out", request, force=False, progress=lambda _: None
        )
    pickle = (adapter / "adapter_model.bin").read_bytes()
    assert manifest.source.files["adapter_model.bin"].blake3 == blake3(pickle).hexdigest()
