"""Where each factor lies in the tensors of a container, whatever their writer made of them."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.adapter.config import parse_config
from lorashard.adapter.containers import ContainerFactors, ContainerTensors, read_container
from lorashard.adapter.keys import ExpertKey, parse_key
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.source_layout import SourceLayout
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from tests.adapters import LAYOUTS, Adapter
from tests.layouts import built, module_of
from tests.strategies import index_of
from tests.tiny import MODULE


def tensors_of(adapter: Adapter) -> ContainerTensors:
    tensors = ContainerTensors()
    for entry in index_of(adapter).tensors:
        key = parse_key(entry.name, len(entry.shape))
        assert isinstance(key, ExpertKey)
        tensors.add(key, entry)
    return tensors


def container_of(adapter: Adapter, **options: Any) -> ContainerFactors:
    config = index_of(adapter).config
    return read_container(MODULE, tensors_of(adapter), config, LayoutOptions(**options), None)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("L1", {"erc"}), ("L2", {"erc", "rce"}), ("L3", {"cre", "ecr"}), ("L6", {"erc", "rec"}),
        ("L7", {"cer", "ecr"}), ("L8", {"erc"}), ("L10", {"erc"}), ("L13", {"ecr"}),
        ("L16", {"erc", "rce"}),
    ],
)  # fmt: skip
def test_the_axes_say_how_a_tensor_lies(layout: str, axes: set[str]) -> None:
    factors = container_of(built(layout)).factors
    assert {source.axes for sources in factors.values() for source in sources} == axes


@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS if x not in ("L5", "L1-w", "L4-gate_up", "L4-down")]
)
def test_each_factor_is_one_tensor_in_one_orientation(layout: str) -> None:
    adapter = built(layout)
    for (projection, matrix), sources in container_of(adapter).factors.items():
        expected = adapter.factors[MODULE, 0, projection][matrix == "lora_B"]
        assert {(source.rows, source.cols) for source in sources} == {tuple(expected.shape)}


def test_shared_factors_have_no_experts_and_the_others_all() -> None:
    factors = container_of(built("L9")).factors
    assert [source.experts for source in factors["gate_proj", "lora_A"]] == [None]
    assert [s.experts for s in factors["gate_proj", "lora_B"]] == [(0,), (1,), (2,), (3,)]
    assert [s.experts for s in container_of(built("L10")).factors["up_proj", "lora_A"]] == [
        (0, 1, 2, 3)
    ]


def test_two_storages_are_one_layout() -> None:
    container = container_of(built("L9"))
    assert container.source_layout == SourceLayout(("per_expert", "stacked"))
    assert not container.fused


@pytest.mark.parametrize(
    ("layout", "fused"), [("L2", True), ("L13", True), ("L14", True), ("L15", True), ("L10", False)]
)
def test_gate_and_up_in_one_pair_are_fused(layout: str, fused: bool) -> None:
    assert container_of(built(layout)).fused == fused


def test_an_empty_w3_makes_w1_the_up_projection() -> None:
    adapter = built("L8", gated=False)
    container = container_of(adapter)
    assert container.non_gated
    assert {projection for projection, _ in container.factors} == {"up_proj", "down_proj"}
    assert str(container.source_layout) == "stacked"


@pytest.mark.parametrize("leaf", ["w2", "up_proj"])
def test_an_empty_stack_other_than_w3_leaves_w1_the_gate(leaf: str) -> None:
    tensors = tensors_of(built("L8"))
    for name in [name for name in tensors.stacked if name[0] != "gate_proj"]:
        del tensors.stacked[name]
    key = parse_key(f"{MODULE}.{leaf}.lora_A", 3)
    assert isinstance(key, ExpertKey)
    tensors.add(key, TensorEntry(f"{MODULE}.{leaf}.lora_A", "F32", (0, 2, 6), 0, 0))
    config = index_of(built("L8")).config
    container = read_container(MODULE, tensors, config, LayoutOptions(), None)
    assert not container.non_gated
    assert {projection for projection, _ in container.factors} == {"gate_proj"}


def test_fused_up_without_gate_is_non_gated() -> None:
    container = container_of(built("L2", gated=False), orientation="standard")
    assert container.non_gated
    assert container.source_layout.up_without_gate


@pytest.mark.parametrize(
    ("layout", "module"),
    [
        ("L1", f"{MODULE}.0.down_proj"), ("L2", f"{MODULE}.down_proj"),
        ("L5", "model.layers.0.block_sparse_moe.output_linear.weight"),
    ],
)  # fmt: skip
def test_patterns_are_matched_against_the_name_that_peft_sees(layout: str, module: str) -> None:
    sources = container_of(built(layout)).factors["down_proj", "lora_A"]
    assert sources[0].module == module


def test_a_container_of_empty_tensors_has_no_storage() -> None:
    tensors = ContainerTensors()
    key = ExpertKey("stacked", MODULE, "up_proj", "lora_A", None)
    tensors.add(key, TensorEntry("w3", "F32", (0, 2, 6), 0, 0))
    assert tensors.storages == ()


def test_a_second_tensor_under_one_key_is_refused() -> None:
    tensors = ContainerTensors()
    key = ExpertKey("expert", MODULE, "up_proj", "lora_A", 3)
    tensors.add(key, TensorEntry("one", "F32", (2, 6), 0, 48))
    with pytest.raises(LayoutError, match="one and other name the same factor"):
        tensors.add(key, TensorEntry("other", "F32", (2, 6), 48, 96))


def test_a_stated_lora_b_layout_is_followed_where_the_config_states_none() -> None:
    adapter = built("L6")
    del adapter.config["lora_B_layout"]
    assert str(container_of(adapter).source_layout) == "fused"
    container = container_of(adapter, lora_b_layout="grouped_by_expert")
    assert container.source_layout.lora_b_layout == "grouped_by_expert"


def test_rows_are_divided_by_the_r_of_the_parameter() -> None:
    adapter = built("L2b")  # r = 4 of gate_up_proj is in rank_pattern
    raw = b'{"r": 2, "lora_alpha": 4, "peft_version": "0.21.2"}'
    tensors, options = tensors_of(adapter), LayoutOptions()
    sources = container_of(adapter).factors["gate_up_proj", "lora_A"]
    assert (sources[0].rows, len(sources[0].experts or ())) == (4, 4)
    without_pattern = read_container(MODULE, tensors, parse_config(raw, ""), options, None)
    (source,) = without_pattern.factors["gate_up_proj", "lora_A"]
    assert (source.rows, len(source.experts or ())) == (2, 8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("up_proj.lora_A", (2**50, 1, 1)), ("lora_gate_and_up_A", (2**50, 1, 1))],
)
def test_experts_are_not_listed_before_they_are_counted(name: str, shape: tuple[int, ...]) -> None:
    entry = TensorEntry(f"{MODULE}.{name}", "F8_E4M3", shape, 0, 2**50)
    key = parse_key(entry.name, 3)
    assert isinstance(key, ExpertKey)
    tensors = ContainerTensors()
    tensors.add(key, entry)
    config = parse_config(b'{"r": 1, "lora_alpha": 4}', "")
    with pytest.raises(LayoutError, match="more than any model has"):
        read_container(MODULE, tensors, config, LayoutOptions(), None)


def test_stacked_fused_pairs_that_do_not_fit_are_refused_with_the_shape_that_would() -> None:
    adapter = built("L16")
    name = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    adapter.tensors[name] = adapter.tensors[name].permute(2, 0, 1).contiguous()
    with pytest.raises(LayoutError, match=r"expected \[out, 2, 4\], \[out, r, experts\]"):
        container_of(adapter)


@pytest.mark.parametrize("marker", [None, "grouped_by_expert"])
def test_the_order_of_columns_is_no_question_where_experts_have_an_axis(marker: str | None) -> None:
    adapter = built("L16", peft_version=None, config={"lora_B_layout": marker})
    axes = {s.axes for sources in container_of(adapter).factors.values() for s in sources}
    assert axes == {"erc", "rce"}


def test_a_stack_states_its_own_r_and_the_config_must_agree() -> None:
    with pytest.raises(LayoutError, match=r"has r=2, adapter_config\.json says 4"):
        module_of(built("L16", config={"r": 4}))


def test_a_lora_b_beside_a_shared_lora_a_has_its_experts_first_if_it_can() -> None:
    factors = container_of(built("L8", num_experts=2, lora_rank=5)).factors  # lora_B [2, 5, 5]
    assert [source.experts for source in factors["gate_proj", "lora_B"]] == [(0, 1)]
