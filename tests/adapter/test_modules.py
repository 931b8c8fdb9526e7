"""A container's factors become stacks; what does not fit together is refused."""

from __future__ import annotations

import pytest

from lorashard.adapter.config import parse_config
from lorashard.adapter.containers import ContainerFactors, FactorName, SourceFactor
from lorashard.adapter.modules import ExpertModule, build_module, gate_up_rows
from lorashard.adapter.options import GateUp
from lorashard.adapter.source_layout import SourceLayout
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry

CONFIG = parse_config(b'{"r": 2, "lora_alpha": 4}', "adapter_config.json")
STACKED = SourceLayout(("stacked",))


def factor(name: str, rows: int, cols: int, *experts: int, dtype: str = "F32") -> SourceFactor:
    """One tensor with the factors of these experts, or with the one for all."""
    entry = TensorEntry(name, dtype, (len(experts), rows, cols), 0, 0)
    return SourceFactor(entry, f"m.{name}", "erc", experts or None, rows, cols)


def pair(
    projection: str, *experts: int, lora_rank: int = 2, sizes: tuple[int, int] | None = None
) -> dict[FactorName, tuple[SourceFactor, ...]]:
    """sizes: in and out features; of a model with 6 hidden and 5 intermediate ones if left out."""
    inside, out = sizes or {"down_proj": (5, 6), "gate_up_proj": (6, 10)}.get(projection, (6, 5))
    a, b = f"{projection}.lora_A", f"{projection}.lora_B"
    return {
        (projection, "lora_A"): (factor(a, lora_rank, inside, *experts),),
        (projection, "lora_B"): (factor(b, out, lora_rank, *experts),),
    }  # type: ignore[dict-item]


def module_with(
    factors: dict[FactorName, tuple[SourceFactor, ...]],
    gate_up: GateUp | None = None,
    source_layout: SourceLayout = STACKED,
    *,
    non_gated: bool = False,
) -> ExpertModule:
    container = ContainerFactors(source_layout, non_gated, factors)
    return build_module("m", container, 3, gate_up, CONFIG)


def test_gate_rows_come_first_or_alternate() -> None:
    assert gate_up_rows(6, interleaved=False) == (range(3), range(3, 6))
    assert [list(rows) for rows in gate_up_rows(6, interleaved=True)] == [[0, 2, 4], [1, 3, 5]]


def test_stacks_are_in_the_order_of_projections_and_matrices() -> None:
    module = module_with(pair("down_proj", 0, 1, 2) | pair("up_proj", 0, 1, 2))
    assert [stack.name for stack in module.stacks] == [
        "m.up_proj.lora_A", "m.up_proj.lora_B", "m.down_proj.lora_A", "m.down_proj.lora_B",
    ]  # fmt: skip
    assert module.stacks_by_factor["down_proj", "lora_A"] is module.stacks[2]


def test_a_stack_knows_its_experts_and_whether_they_share_it() -> None:
    factors = pair("up_proj", 0, 2) | pair("down_proj")
    stacks = module_with(factors).stacks_by_factor
    assert (stacks["up_proj", "lora_A"].experts, stacks["up_proj", "lora_A"].shared) == (
        (0, 2), False,
    )  # fmt: skip
    assert (stacks["down_proj", "lora_A"].experts, stacks["down_proj", "lora_A"].shared) == (
        (), True,
    )  # fmt: skip


def test_an_expert_is_absent_only_if_no_projection_is_trained() -> None:
    module = module_with(pair("up_proj", 0) | pair("down_proj", 0, 2))
    assert module.absent_experts == (1,)
    assert module.expert_lora_ranks == {"up_proj": {1: 0, 2: 0}, "down_proj": {1: 0}}


@pytest.mark.parametrize(
    ("projection", "stated", "gate_up"),
    [
        ("up_proj", None, "split"), ("up_proj", "interleaved", "split"), ("up_proj", "none", "none"),
        ("gate_proj", "none", "split"),
        ("gate_up_proj", None, "concatenated"), ("gate_up_proj", "interleaved", "interleaved"),
        ("gate_up_proj", "none", "none"), ("down_proj", "interleaved", "split"),
    ],
)  # fmt: skip
def test_the_order_of_gate_and_up_rows_follows_tensors_then_the_model(
    projection: str, stated: GateUp | None, gate_up: str
) -> None:
    assert module_with(pair(projection, 0, 1, 2), stated).gate_up == gate_up


@pytest.mark.parametrize(("stated", "gate_up"), [(None, "concatenated"), ("interleaved",) * 2])
def test_a_fused_down_proj_alone_belongs_to_a_fused_gate_up(
    stated: GateUp | None, gate_up: str
) -> None:
    module = module_with(pair("down_proj", 0, 1, 2), stated, SourceLayout(("fused",)))
    assert (module.layout, module.gate_up) == ("fused", gate_up)


def test_experts_whose_tensors_show_no_gate_have_none() -> None:
    assert module_with(pair("up_proj", 0, 1, 2), "concatenated", non_gated=True).gate_up == "none"


def test_the_r_of_nemo_s_own_files_is_that_of_the_tensors() -> None:
    factors = pair("up_proj", 0, 1, 2, lora_rank=3)
    with pytest.raises(LayoutError, match=r"has r=3, adapter_config\.json says 2"):
        module_with(factors)
    module = module_with(factors, source_layout=SourceLayout(("native",)))
    assert (module.lora_rank, module.scaling) == (3, {"up_proj": 4 / 3})


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        (
            {"up_proj": (6, 5), "down_proj": (5, 7)},
            "up_proj.lora_A has 6 input features, down_proj.lora_B has 7 output features.",
        ),
        (
            {"up_proj": (6, 5), "down_proj": (4, 6)},
            "up_proj.lora_B has 5 output features, down_proj.lora_A has 4 input features.",
        ),
        (
            {"gate_proj": (6, 5), "up_proj": (7, 5)},
            "gate_proj.lora_A has 6 input features, up_proj.lora_A has 7 input features.",
        ),
        (
            {"gate_proj": (6, 5), "up_proj": (6, 4)},
            "gate_proj.lora_B has 5 output features, up_proj.lora_B has 4 output features.",
        ),
        (
            {"gate_up_proj": (6, 10), "down_proj": (10, 6)},
            (
                "gate_up_proj.lora_B has 10 output features of gate and up together, "
                "down_proj.lora_A has 10 input features."
            ),
        ),
        (
            {"gate_up_proj": (6, 11), "down_proj": (5, 6)},
            (
                "gate_up_proj.lora_B has 11 output features of gate and up together, "
                "down_proj.lora_A has 5 input features."
            ),
        ),
    ],
)
def test_projections_of_different_models_are_refused(
    projections: dict[str, tuple[int, int]], message: str
) -> None:
    factors = {}
    for projection, sizes in projections.items():
        factors |= pair(projection, 0, 1, 2, sizes=sizes)
    with pytest.raises(LayoutError) as caught:
        module_with(factors)
    assert caught.value.message == message


@pytest.mark.parametrize(
    "projections",
    [
        {"gate_proj": (6, 5), "up_proj": (6, 5), "down_proj": (5, 6)},
        {"gate_up_proj": (6, 10), "down_proj": (5, 6)},
        {"gate_up_proj": (6, 11)},
        {"down_proj": (5, 7)},
        {"gate_proj": (6, 5), "down_proj": (5, 6)},
    ],
)
def test_projections_that_fit_or_stand_alone_are_taken(
    projections: dict[str, tuple[int, int]],
) -> None:
    factors = {}
    for projection, sizes in projections.items():
        factors |= pair(projection, 0, 1, 2, sizes=sizes)
    assert set(module_with(factors).scaling) == set(projections)


def test_without_a_gate_the_rows_of_both_are_those_of_up() -> None:
    factors = pair("gate_up_proj", 0, 1, 2, sizes=(6, 5)) | pair("down_proj", 0, 1, 2)
    assert module_with(factors, "none").gate_up == "none"
    with pytest.raises(LayoutError, match="of gate and up together"):
        module_with(factors, "concatenated")


def test_a_missing_factor_of_one_expert_is_named() -> None:
    factors = pair("up_proj", 0, 1, 2)
    factors["up_proj", "lora_B"] = (factor("b", 5, 2, 0, 1),)
    message = r"m\.up_proj: lora_B of expert 2 is missing \(up_proj\.lora_A is present\)"
    with pytest.raises(LayoutError, match=message):
        module_with(factors)


def test_a_factor_for_all_beside_one_for_a_single_expert_is_refused() -> None:
    factors = pair("up_proj", 0, 1, 2)
    factors["up_proj", "lora_A"] += (factor("shared", 2, 6),)
    with pytest.raises(LayoutError, match=r"m\.up_proj lora_A: both a factor shared by all"):
        module_with(factors)


def test_dtypes_that_differ_are_refused() -> None:
    factors = pair("up_proj", 0, 1)
    first = factors["up_proj", "lora_A"][0]
    other = factor("other", 2, 6, 2, dtype="F16")
    factors["up_proj", "lora_A"] = (first, other)
    factors["up_proj", "lora_B"] = (factor("b", 5, 2, 0, 1, 2),)
    with pytest.raises(LayoutError, match=r"other is F16 with 6 features, up_proj\.lora_A is F32"):
        module_with(factors)


def test_a_tensor_that_may_hold_all_experts_gets_no_advice_to_change_the_config() -> None:
    with pytest.raises(LayoutError, match=r"has r=8, adapter_config\.json says 2") as caught:
        module_with(pair("gate_up_proj", lora_rank=8))
    assert "may hold the factors of all experts" in str(caught.value)
    assert "rank_pattern" not in str(caught.value)
