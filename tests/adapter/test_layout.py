"""Every layout is read for what it is; what is incomplete, contradictory or ambiguous is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorashard.errors import LayoutError, NoExpertsError, UnsupportedAdapterError
from tests.adapters import LAYOUTS, SPLIT, Adapter, Spec, build
from tests.layouts import ATTENTION, EXPERTS, built, module_of, refusal
from tests.strategies import layout_of


def without(adapter: Adapter, *names: str) -> Adapter:
    for name in names:
        del adapter.tensors[name]
    return adapter


def with_tensor(adapter: Adapter, name: str, *shape: int, dtype: Any = torch.float32) -> Adapter:
    adapter.tensors[name] = torch.zeros(shape, dtype=dtype)
    return adapter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_experts_are_counted(layout: str):
    assert layout_of(built(layout, num_experts=7)).num_experts == 7


@pytest.mark.parametrize(
    ("layout", "spelling"),
    [
        ("L1", "per_expert"), ("L1-w", "per_expert"), ("L2", "fused"), ("L2b", "fused"),
        ("L3", "fused_transposed"), ("L4-gate_up", "fused"), ("L4-down", "fused"),
        ("L5", "fused_transposed"), ("L6", "fused_grouped_by_expert"),
        ("L7", "fused_transposed_grouped_by_expert"), ("L8", "stacked"),
        ("L9", "per_expert+stacked"), ("L10", "stacked"), ("L11", "stacked"), ("L12", "stacked"),
        ("L13", "native"), ("L14", "stacked"), ("L15", "per_expert"),
    ],
)  # fmt: skip
def test_a_layout_is_told_by_its_tensors(layout: str, spelling: str):
    assert str(module_of(built(layout)).source_layout) == spelling


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stacks_are_the_trained_projections(layout: str):
    adapter = built(layout)
    stacks = {(s.projection, s.matrix) for s in module_of(adapter).stacks}
    assert stacks == {(p, m) for p in adapter.spec.trained() for m in ("lora_A", "lora_B")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_has_the_shape_of_its_factors(layout: str):
    adapter = built(layout)
    module = module_of(adapter)
    for stack in module.stacks:
        factor = adapter.factors[module.name, 0, stack.projection][stack.matrix == "lora_B"]
        assert (stack.rows, stack.cols) == tuple(factor.shape)


@pytest.mark.parametrize(
    ("layout", "shared"),
    [
        ("L8", {"gate_proj.lora_A", "up_proj.lora_A", "down_proj.lora_B"}),
        ("L9", {"gate_proj.lora_A", "up_proj.lora_A", "down_proj.lora_B"}),
        ("L10", set()),
        ("L11", {f"{p}.{m}" for p in SPLIT for m in ("lora_A", "lora_B")}),
    ],
)
def test_factors_that_all_experts_share_are_known(layout: str, shared: set[str]):
    stacks = module_of(built(layout)).stacks
    assert {f"{s.projection}.{s.matrix}" for s in stacks if s.shared} == shared


def test_scaling_follows_the_patterns_of_the_config():
    assert module_of(built("L2b")).scaling == {"gate_up_proj": 2.0, "down_proj": 2.0}


def test_scaling_differs_between_experts_whose_r_differs():
    module = module_of(built(lora_ranks={1: 4}))
    assert module.scaling["up_proj"] == (2.0, 1.0, 2.0, 2.0)


def test_scaling_of_an_expert_that_is_not_trained_is_zero_beside_others():
    module = module_of(built(lora_ranks={1: 4}, experts=(0, 1, 3)))
    assert module.scaling["up_proj"] == (2.0, 1.0, 0.0, 2.0)


def test_an_r_that_differs_is_named_per_expert():
    module = module_of(built(lora_ranks={1: 4, 2: 1}))
    assert module.expert_lora_ranks["up_proj"] == {0: 2, 2: 1, 3: 2}


def test_an_expert_that_is_not_trained_is_absent():
    assert module_of(built(experts=(0, 2))).absent_experts == (1, 3)


def test_experts_beyond_ten_are_numbers():
    stack = module_of(built(num_experts=12)).stacks[0]
    assert stack.experts == tuple(range(12))


def test_modules_are_told_apart_by_layer():
    names = [m.name for m in layout_of(built("L3", num_layers=2)).modules]
    assert names == [f"model.layers.{i}.mlp.experts" for i in range(2)]


def test_what_is_no_expert_s_is_replicated():
    adapter = built(extras=True)
    assert {e.name for e in layout_of(adapter).replicated} == set(adapter.replicated)


def test_an_adapter_without_experts_has_nothing_to_split():
    adapter = built(extras=True)
    with pytest.raises(NoExpertsError):
        layout_of(replace(adapter, tensors=adapter.replicated))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("L9", "L11")])
@pytest.mark.parametrize("matrix", ["_A", "_B"])
def test_a_factor_without_its_partner_is_refused(layout: str, matrix: str):
    adapter = built(layout)
    name = next(n for n in adapter.tensors if f"{matrix}." in f"{n}.")
    assert refusal(without(adapter, name), num_experts=4)


@pytest.mark.parametrize("experts", [(1, 2), (0, 2), (3,)])
def test_an_unknown_number_of_experts_is_refused(experts: tuple[int, ...]):
    assert "`num_experts=N`" in refusal(built(experts=experts), num_experts=None)


def test_an_expert_beyond_the_model_s_is_refused():
    assert "has expert 3, but the model has 3 experts" in refusal(built(), num_experts=3)


@pytest.mark.parametrize("layout", ["L2", "L10", "L13"])
def test_a_stack_of_another_number_of_experts_is_refused(layout: str):
    assert "holds 4 experts, the model" in refusal(built(layout), num_experts=8)


def test_layers_with_different_numbers_of_experts_are_refused():
    adapter = built("L10")
    other = build(Spec("L10", num_experts=3)).tensors
    more = {name.replace("layers.0", "layers.1"): tensor for name, tensor in other.items()}
    assert "holds" in refusal(replace(adapter, tensors=adapter.tensors | more))


@pytest.mark.parametrize(
    ("one", "other"), [("L1", "L10"), ("L10", "L13"), ("L1", "L11"), ("L2", "L14"), ("L15", "L14")]
)
def test_a_factor_spelled_twice_is_refused(one: str, other: str):
    adapter = built(one)
    assert "Keep one of them; lorashard does not guess which is meant." in refusal(
        replace(adapter, tensors=adapter.tensors | built(other).tensors)
    )


@pytest.mark.parametrize(
    "name", ["experts.1.w1.lora_A.weight", "experts.1.gate_proj.lora_A", "experts.01.w1.lora_A"]
)
def test_two_names_of_one_factor_are_refused(name: str):
    adapter = with_tensor(built(), f"base_model.model.model.layers.0.mlp.{name}", 2, 6)
    assert "name the same factor" in refusal(adapter)


def test_a_factor_with_and_without_peft_s_prefix_is_refused():
    adapter = built(extras=True)
    for matrix in "AB":
        one = f"{ATTENTION}.lora_{matrix}.weight"
        adapter.tensors[one.removeprefix("base_model.model.")] = adapter.tensors[one]
    said = refusal(adapter)
    assert "name the same factor" in said
    assert "Keep one of them; lorashard does not guess which is meant." in said


def test_two_heads_that_differ_only_by_a_wrapper_are_refused():
    adapter = built(extras=True)
    for name in ("score.weight", "_orig_mod.score.weight"):
        adapter.tensors[name] = torch.zeros(2, 6)
    assert "_orig_mod.score.weight and score.weight name the same tensor" in refusal(adapter)


def test_gate_up_beside_gate_and_up_is_refused():
    adapter = built("L10")
    both = replace(adapter, tensors=adapter.tensors | built("L14").tensors)
    assert "gate_up_proj as well as gate_proj" in refusal(both)


@pytest.mark.parametrize("layout", ["L1", "L8", "L9", "L10", "L11", "L12", "L14", "L15"])
def test_an_r_that_the_config_does_not_say_is_refused(layout: str):
    assert "adapter_config.json says 3" in refusal(built(layout, config={"r": 3}))


def test_a_replicated_factor_of_another_r_is_refused():
    adapter = with_tensor(built(extras=True), f"{ATTENTION}.lora_A.weight", 8, 6)
    assert "has r=8" in refusal(adapter)


def test_a_router_that_is_a_bare_parameter_is_matched_by_the_parameter_s_name():
    adapter = built(config={"rank_pattern": {r"mlp\.gate\.weight": 3}})
    with_tensor(adapter, "base_model.model.model.layers.0.mlp.gate.lora_A.weight", 3, 6)
    with_tensor(adapter, "base_model.model.model.layers.0.mlp.gate.lora_B.weight", 4, 3)
    assert len(layout_of(adapter).replicated) == 2


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_replicated_factor_alone_is_refused(matrix: str):
    adapter = without(built(extras=True), f"{ATTENTION}.{matrix}.weight")
    assert "has no partner" in refusal(adapter)


def test_an_r_that_differs_within_a_pair_is_refused():
    adapter = with_tensor(built(), f"{EXPERTS}.1.up_proj.lora_B.weight", 5, 3)
    assert "do not belong together" in refusal(adapter)


def test_features_that_differ_between_experts_are_refused():
    adapter = with_tensor(built(), f"{EXPERTS}.1.up_proj.lora_A.weight", 2, 7)
    assert "one shape and dtype" in refusal(adapter)


def test_dtypes_that_differ_between_experts_are_refused():
    name = f"{EXPERTS}.1.up_proj.lora_A.weight"
    assert "one shape and dtype" in refusal(with_tensor(built(), name, 2, 6, dtype=torch.float16))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        (f"{ATTENTION}.lora_magnitude_vector", "DoRA"),
        (f"{EXPERTS}.0.up_proj.lora_magnitude_vector.weight", "DoRA"),
        (f"{ATTENTION}.lora_B.bias", "a LoRA bias"),
        (f"{EXPERTS}.0.up_proj.weight", "expert tensors"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "other than a LoRA factor"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(name: str, feature: str):
    with pytest.raises(UnsupportedAdapterError, match=feature):
        layout_of(with_tensor(built(), name, 6))


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fnuz], ids=str
)
def test_a_factor_that_is_no_usual_float_is_refused(dtype: torch.dtype):
    with pytest.raises(LayoutError, match="a LoRA factor cannot have dtype"):
        layout_of(with_tensor(built(), f"{EXPERTS}.1.up_proj.lora_A.weight", 2, 6, dtype=dtype))


@pytest.mark.parametrize("layout", ["L1", "L2", "L10", "L13"])
@pytest.mark.parametrize("shape", [(), (12,), (1, 2, 2, 3)], ids=str)
def test_a_number_of_dimensions_that_no_layout_has_is_refused(layout, shape):
    adapter = built(layout)
    assert refusal(with_tensor(adapter, next(iter(adapter.tensors)), *shape))


def test_an_empty_factor_of_one_expert_is_refused():
    assert "has r=0" in refusal(with_tensor(built(), f"{EXPERTS}.1.up_proj.lora_A.weight", 0, 6))


def test_a_container_of_empty_stacks_alone_is_refused():
    adapter = built("L10")
    empty = {name: tensor[:0].clone() for name, tensor in adapter.tensors.items()}
    with pytest.raises(NoExpertsError):
        layout_of(replace(adapter, tensors=empty))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec(num_experts=8, experts=(0, 1, 2), extras=True), "its router chooses from 8"),
        (
            Spec("L2", num_experts=8, extras=True),
            "would have 16 experts, but its router chooses from 8",
        ),
    ],
    ids=["some-experts", "r-of-the-config-too-small"],
)
def test_a_router_of_another_number_of_experts_is_refused(spec: Spec, reason: str):
    adapter = build(replace(spec, lora_rank=4))
    if spec.layout == "L2":  # 16 experts of r 2 instead of 8 of r 4
        adapter.config["rank_pattern"] = {r".*experts\..*": 2}
    assert reason in refusal(adapter, num_experts=None)


def test_an_endless_expert_id_is_refused():
    adapter = with_tensor(built(), f"{EXPERTS}.{'9' * 5000}.up_proj.lora_A.weight", 2, 6)
    with pytest.raises((LayoutError, UnsupportedAdapterError)):
        layout_of(adapter)


def test_two_adapters_in_one_file_are_refused():
    adapter = built(extras=True)
    for matrix in "AB":
        one = f"{ATTENTION}.lora_{matrix}.weight"
        adapter.tensors[one.replace(".weight", ".second.weight")] = adapter.tensors[one]
    assert "name the same tensor" in refusal(adapter)


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x00", "\x1b", "\x7f", "\x85", "\u2028"])
@pytest.mark.parametrize("name", ["q_proj.lora_A.weight", "experts.0.up_proj.lora_A.weight"])
def test_a_name_with_control_characters_is_refused(character: str, name: str):
    hostile = f"base_model.model.model.layers.0.mlp{character}.{name}"
    message = refusal(with_tensor(built("L1"), hostile, 2, 6))
    assert ascii(hostile) in message
    assert hostile not in message


def test_an_expert_with_r_0_is_not_trained():
    module = module_of(built(lora_ranks={1: 0}))
    assert module.absent_experts == (1,)
    assert module.scaling == dict.fromkeys(SPLIT, 2.0)
    assert [stack.experts for stack in module.stacks] == [(0, 2, 3)] * 6
    assert module.lora_rank == 2


def test_the_largest_expert_with_r_0_still_counts():
    assert layout_of(built(lora_ranks={3: 0})).num_experts == 4


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_one_empty_factor_alone_is_refused(matrix: str):
    name = f"{EXPERTS}.1.up_proj.{matrix}.weight"
    shape = (0, 6) if matrix == "lora_A" else (5, 0)
    assert "has r=" in refusal(with_tensor(built(lora_ranks={}), name, *shape))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (0, 6, 1)])
def test_an_empty_factor_that_says_no_r_of_0_is_refused(shape: tuple[int, ...]):
    name = f"{EXPERTS}.1.up_proj.lora_A.weight"
    assert "at least one row and column" in refusal(with_tensor(built(), name, *shape))


def test_empty_factors_to_which_the_config_gives_an_r_are_refused():
    adapter = built(lora_ranks={1: 0})
    adapter.config["rank_pattern"] = {}
    assert "has r=0, adapter_config.json says 2" in refusal(adapter)
    adapter = built(lora_ranks=dict.fromkeys(range(4), 0))
    adapter.config["rank_pattern"] = {}
    assert "has r=0, adapter_config.json says 2" in refusal(adapter)


def test_factors_with_elements_to_which_the_config_gives_r_0_are_refused():
    adapter = built()
    adapter.config["rank_pattern"] = {r"experts\.1\.\w+": 0}
    assert "has r=2, adapter_config.json says 0" in refusal(adapter)
    fused = built("L2")
    fused.config["rank_pattern"] = {"experts.down_proj": 0}
    assert "not a multiple of r=0" in refusal(fused)


def test_experts_of_which_none_has_a_rank_are_no_module():
    adapter = built(num_layers=2)
    emptied = built(num_layers=2, lora_ranks=dict.fromkeys(range(4), 0))
    layer_1 = {name: t for name, t in emptied.tensors.items() if ".layers.1." in name}
    adapter.tensors.update(layer_1)
    adapter.config["rank_pattern"] = {r"layers\.1\.mlp\.experts\..*": 0}
    assert [module.name for module in layout_of(adapter).modules] == ["model.layers.0.mlp.experts"]
    with pytest.raises(NoExpertsError):
        layout_of(emptied)


def test_a_projection_of_which_no_expert_has_a_rank_is_not_trained():
    adapter = built()
    emptied = built(lora_ranks=dict.fromkeys(range(4), 0))
    adapter.tensors.update({n: t for n, t in emptied.tensors.items() if ".gate_proj." in n})
    adapter.config["rank_pattern"] = {"gate_proj": 0}
    module = module_of(adapter)
    assert list(module.scaling) == ["up_proj", "down_proj"]
    assert module.absent_experts == ()


def test_a_module_beside_the_experts_with_r_0_is_left_out():
    adapter = built(extras=True)
    adapter = with_tensor(adapter, f"{ATTENTION}.lora_A.weight", 0, 6)
    adapter = with_tensor(adapter, f"{ATTENTION}.lora_B.weight", 12, 0)
    assert "has r=0, adapter_config.json says 2" in refusal(adapter)
    adapter.config["rank_pattern"] = {"q_proj": 0}
    names = [entry.name for entry in layout_of(adapter).replicated]
    assert len(names) == 4
    assert not any("q_proj" in name for name in names)


@pytest.mark.parametrize("projection", ["moe.base_layer", "moe"])
def test_unsloth_s_name_for_experts_is_told(projection: str):
    name = f"base_model.model.model.language_model.layers.0.{projection}.lora_A.weight"
    adapter = with_tensor(built("L1"), name, 8, 6)
    message = refusal(with_tensor(adapter, name.replace("lora_A", "lora_B"), 6, 8))
    assert "`moe` is Unsloth's name for `experts`" in message
    assert "`.moe.` to `.moe.experts.`" in message


def test_two_banks_of_experts_are_told():
    narrower = with_tensor(built("L1"), f"{EXPERTS}.3.up_proj.lora_B.weight", 2, 2)
    assert "Two banks of experts in one list (ERNIE-4.5-VL" in refusal(narrower)
    more = built("L1")
    with pytest.raises(LayoutError, match="two banks of experts"):
        layout_of(replace(more, options={"num_experts": 2}))
