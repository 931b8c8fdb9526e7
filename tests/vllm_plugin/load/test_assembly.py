"""Every row of a shard's factors lands where the live layer computes the same weight change.

The pieces are carried out with numpy, on random stacks, and the result is multiplied out as vLLM's
kernels do; compared is what the shard's own factors give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.errors import LayoutError
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.assembly import (
    Assembly,
    DeviceFactor,
    Piece,
    ShardStack,
    plan_assembly,
)

Values = npt.NDArray[np.int64]
Deltas = dict[str, Values]  # projection -> [E_local, out, in]

WHERE = "model.layers.0.mlp.experts"
LIVE = LiveExperts(
    name="language_model.model.layers.0.mlp.experts",
    wrapper="2d",
    num_experts=8,
    ep_rank=0,
    ep_size=2,
    local_experts=(0, 1, 2, 3),
    gated=True,
    hidden_size=6,
    intermediate_size=4,
    buffer_intermediate=4,
    max_lora_rank=64,
    interleaved=False,
    shared_outer=False,
)


@dataclass(frozen=True)
class Case:
    live: LiveExperts
    gate_up: str
    stacks: tuple[ShardStack, ...]
    values: dict[str, Values]

    def assembled(self) -> Assembly:
        return plan_assembly(self.live, self.stacks, self.gate_up, WHERE)


def sizes(live: LiveExperts, projection: str) -> tuple[int, int]:
    """in, out"""
    hidden, inner = live.hidden_size, live.intermediate_size
    if projection == "down_proj":
        return inner, hidden
    return hidden, 2 * inner if projection == "gate_up_proj" else inner


def pair(
    live: LiveExperts, projection: Any, r: int, *, shared: str = ""
) -> tuple[ShardStack, ShardStack]:
    """shared: the matrices, of "A" and "B", that all experts have in common."""
    inside, out = sizes(live, projection)
    return (
        ShardStack(f"{projection}.lora_A", projection, "lora_A", "BF16", r, inside, "A" in shared),
        ShardStack(f"{projection}.lora_B", projection, "lora_B", "BF16", out, r, "B" in shared),
    )


@st.composite
def live_layers(draw: st.DrawFn) -> LiveExperts:
    wrapper = draw(st.sampled_from(["2d", "3d"]))
    num_local = draw(st.integers(0, 4))
    inner = draw(st.integers(1, 5))
    return replace(
        LIVE,
        wrapper=wrapper,
        local_experts=tuple(draw(st.permutations(range(8)))[:num_local]),
        gated=wrapper == "3d" or draw(st.booleans()),
        hidden_size=draw(st.integers(1, 5)),
        intermediate_size=inner,
        buffer_intermediate=inner + draw(st.sampled_from([0, 0, 1, 3])),
        interleaved=draw(st.booleans()),
        shared_outer=wrapper == "2d" and draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    live = draw(live_layers())
    if not live.gated:
        trained, gate_up = ["up_proj"], "none"
    elif draw(st.booleans()):
        trained, gate_up = ["gate_up_proj"], draw(st.sampled_from(["concatenated", "interleaved"]))
    else:
        trained, gate_up = ["gate_proj", "up_proj"], "split"
    some = draw(st.sets(st.sampled_from([*trained, "down_proj"]), min_size=1))
    stacks: list[ShardStack] = []
    for projection in sorted(some):
        shared = "".join(draw(st.sets(st.sampled_from("AB"))))
        if live.shared_outer:
            shared += "B" if projection == "down_proj" else "A"
        stacks += pair(live, projection, draw(st.integers(1, 4)), shared=shared)
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = {
        stack.name: numbers.integers(
            -9, 10, (1 if stack.shared else len(live.local_experts), stack.rows, stack.cols)
        )
        for stack in stacks
    }
    return Case(live, gate_up, tuple(draw(st.permutations(stacks))), values)


def carried_out(factor: DeviceFactor, values: dict[str, Values]) -> Values:
    """The tensor that the pieces make."""
    return carried_out_and_counted(factor, values)[0]


def carried_out_and_counted(
    factor: DeviceFactor, values: dict[str, Values]
) -> tuple[Values, Values]:
    """The same, and which elements were written; none may be written twice."""
    tensor = np.zeros((factor.num_slots, factor.rows, factor.cols), np.int64)
    written = np.zeros((factor.rows, factor.cols), np.int64)
    for piece in factor.pieces:
        assert len(piece.source_rows) == len(piece.target_rows)
        for source_row, row in zip(piece.source_rows, piece.target_rows):
            source = values[piece.stack.name][:, source_row]
            columns = slice(piece.first_col, piece.first_col + piece.stack.cols)
            assert tensor[:, row, columns].shape[1:] == source.shape[1:]
            tensor[:, row, columns] = source
            written[row, columns] += 1
    assert written.max(initial=0) <= 1
    return tensor, written


def on_device(case: Case) -> Deltas:
    """What the live layer makes of the parts: gate, down, up (2-D), or gate_up, down (3-D)."""
    live, assembly = case.live, case.assembled()
    tensors = [carried_out(factor, case.values) for factor in assembly.factors]
    parts = [
        (tensors[b] @ tensors[a]) + np.zeros((len(live.local_experts), 1, 1), np.int64)
        for a, b in zip(assembly.lora_a, assembly.lora_b)
    ]
    if live.wrapper == "2d":
        gate, down, up = parts
        return {"gate_proj": gate, "up_proj": up, "down_proj": down}
    rows, down = parts
    whole = np.zeros((len(rows), 2 * live.buffer_intermediate, live.hidden_size), np.int64)
    whole[:, : rows.shape[1]] = rows
    if live.interleaved:
        gate, up = whole[:, 0::2], whole[:, 1::2]
    else:
        gate, up = np.split(whole, 2, axis=1)
    size = live.intermediate_size
    assert not gate[:, size:].any(), "the buffer's padding is filled"
    assert not up[:, size:].any(), "the buffer's padding is filled"
    return {"gate_proj": gate[:, :size], "up_proj": up[:, :size], "down_proj": down}


def of_the_shard(case: Case) -> Deltas:
    """B @ A of the shard's own factors; zero where nothing is trained."""
    live, deltas = case.live, {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        inside, out = sizes(live, name)
        deltas[name] = np.zeros((len(live.local_experts), out, inside), np.int64)
    for projection in {stack.projection for stack in case.stacks}:
        delta = case.values[f"{projection}.lora_B"] @ case.values[f"{projection}.lora_A"]
        if projection != "gate_up_proj":
            deltas[projection] += delta
        elif case.gate_up == "interleaved":
            deltas["gate_proj"] += delta[:, 0::2]
            deltas["up_proj"] += delta[:, 1::2]
        else:
            for name, half in zip(("gate_proj", "up_proj"), np.split(delta, 2, axis=1)):
                deltas[name] += half
    if not live.gated:  # vLLM's w3 is its w1 then
        deltas["gate_proj"] = deltas["up_proj"]
    return deltas


@settings(deadline=None, max_examples=400)
@given(cases())
def test_the_live_layer_computes_what_the_shard_s_factors_say(case: Case) -> None:
    found, expected = on_device(case), of_the_shard(case)
    for projection, delta in expected.items():
        np.testing.assert_array_equal(found[projection], delta, projection)


@settings(deadline=None)
@given(cases())
def test_a_verbatim_factor_is_its_stack_byte_for_byte(case: Case) -> None:
    for factor in case.assembled().factors:
        if factor.is_verbatim:
            (piece,) = factor.pieces
            stack = case.values[piece.stack.name]
            np.testing.assert_array_equal(carried_out(factor, case.values), stack)
            assert len(stack) == factor.num_slots, "so nothing is repeated"


@settings(deadline=None)
@given(cases())
def test_a_factor_is_covered_if_its_pieces_write_every_element(case: Case) -> None:
    for factor in case.assembled().factors:
        _, written = carried_out_and_counted(factor, case.values)
        assert factor.is_covered == bool(written.all())


@settings(deadline=None)
@given(cases())
def test_no_tensor_is_made_twice_or_for_nothing(case: Case) -> None:
    assembly = case.assembled()
    assert len(set(assembly.factors)) == len(assembly.factors)
    assert {*assembly.lora_a, *assembly.lora_b} == set(range(len(assembly.factors)))
    parts = 3 if case.live.wrapper == "2d" else 2
    assert len(assembly.lora_a) == len(assembly.lora_b) == parts
    assert assembly.lora_rank == max(assembly.factors[index].rows for index in assembly.lora_a)


@settings(deadline=None)
@given(cases())
def test_both_factors_of_a_part_have_its_rank_and_the_slots_of_the_engine(case: Case) -> None:
    live, assembly = case.live, case.assembled()
    for part, (a, b) in enumerate(zip(assembly.lora_a, assembly.lora_b)):
        lora_a, lora_b = assembly.factors[a], assembly.factors[b]
        assert lora_a.rows == lora_b.cols
        down = part == 1
        slots = [len(live.local_experts)] * 2
        if live.shared_outer:
            slots[1 if down else 0] = 1
        assert [lora_a.num_slots, lora_b.num_slots] == slots


def test_gate_and_up_of_a_fused_adapter_have_one_lora_a() -> None:
    stacks = [*pair(LIVE, "gate_up_proj", 3), *pair(LIVE, "down_proj", 3)]
    assembly = plan_assembly(LIVE, stacks, "concatenated", WHERE)
    gate, _, up = assembly.lora_a
    assert gate == up
    assert len(assembly.factors) == 5


def test_experts_without_a_gate_have_one_pair_for_w1_and_w3() -> None:
    live = replace(LIVE, gated=False)
    assembly = plan_assembly(
        live, [*pair(live, "up_proj", 3), *pair(live, "down_proj", 2)], "none", "x"
    )
    assert assembly.lora_a[0] == assembly.lora_a[2]
    assert assembly.lora_b[0] == assembly.lora_b[2]


@pytest.mark.parametrize("wrapper", ["2d", "3d"])
def test_an_adapter_in_the_engine_s_own_form_is_read_straight_to_its_place(wrapper: Any) -> None:
    live = replace(LIVE, wrapper=wrapper)
    names = ("gate_proj", "up_proj") if wrapper == "2d" else ("gate_up_proj",)
    stacks = [s for name in (*names, "down_proj") for s in pair(live, name, 2)]
    gate_up = "split" if wrapper == "2d" else "concatenated"
    assert all(factor.is_verbatim for factor in plan_assembly(live, stacks, gate_up, "x").factors)


def test_rows_that_alternate_on_both_sides_are_read_straight_too() -> None:
    live = replace(LIVE, wrapper="3d", interleaved=True, buffer_intermediate=7)
    assembly = plan_assembly(live, pair(live, "gate_up_proj", 2), "interleaved", WHERE)
    assert assembly.factors[assembly.lora_b[0]].is_verbatim


def refusal(live: LiveExperts, stacks: Any, gate_up: str = "split") -> str:
    with pytest.raises(LayoutError) as caught:
        plan_assembly(live, list(stacks), gate_up, WHERE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("projection", "matrix", "found", "expected"),
    [
        ("gate_proj", "lora_A", 16, 6), ("up_proj", "lora_B", 16, 4),
        ("gate_up_proj", "lora_A", 16, 6), ("gate_up_proj", "lora_B", 16, 8),
        ("down_proj", "lora_A", 16, 4), ("down_proj", "lora_B", 16, 6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapper", ["2d", "3d"])
def test_a_factor_of_another_model_is_refused_with_both_sizes(
    wrapper: Any, projection: Any, matrix: str, found: int, expected: int
) -> None:
    live = replace(LIVE, wrapper=wrapper)
    size = "cols" if matrix == "lora_A" else "rows"
    stacks = [
        replace(stack, **{size: found}) if stack.matrix == matrix else stack
        for stack in pair(live, projection, 2)
    ]
    assert refusal(live, stacks) == (
        f"{WHERE}: {projection} {matrix} has {found} features, but {live.name} has {expected}.\n"
        "  Is the adapter for this model?"
    )


@pytest.mark.parametrize(
    ("wrapper", "projection"),
    [("2d", "down_proj"), ("2d", "gate_proj"), ("3d", "down_proj"), ("3d", "gate_up_proj")],
)
def test_a_rank_above_the_engine_s_is_refused_with_the_value_to_start_with(
    wrapper: Any, projection: Any
) -> None:
    live = replace(LIVE, wrapper=wrapper, max_lora_rank=16)
    assert refusal(live, pair(live, projection, 17)) == (
        f"{WHERE}: r=17 for {live.name}, but the engine has room for 16.\n"
        "  Start vLLM with --max-lora-rank 32."
    )
    assert plan_assembly(live, pair(live, projection, 16), "split", WHERE).lora_rank == 16


def test_two_ranks_that_add_up_are_refused_with_the_two_ways_out() -> None:
    live = replace(LIVE, wrapper="3d", max_lora_rank=16)
    stacks = [*pair(live, "gate_proj", 16), *pair(live, "up_proj", 16)]
    assert refusal(live, stacks) == (
        f"{WHERE}: r=32 for {live.name}, but the engine has room for 16.\n"
        "  Start vLLM with --max-lora-rank 32, or with --enable-mixed-moe-lora-format: the adapter has gate "
        "and up as separate factors; this model's LoRA class combines them, which adds up their ranks."
    )


@pytest.mark.parametrize("projection", ["gate_proj", "gate_up_proj"])
def test_a_gate_is_refused_where_the_experts_have_none(projection: Any) -> None:
    live = replace(LIVE, gated=False)
    stacks = [*pair(live, projection, 2), *pair(live, "up_proj", 2)]
    assert refusal(live, stacks) == (
        f"{WHERE}: trains a gate, but the experts of {live.name} have none.\n"
        "  Is the adapter for this model?"
    )


@pytest.mark.parametrize(
    ("projection", "shared", "named", "gated"),
    [
        ("gate_proj", "B", "gate_proj lora_A", True),
        ("gate_up_proj", "B", "gate_up_proj lora_A", True),
        ("down_proj", "A", "down_proj lora_B", True),
        ("up_proj", "B", "up_proj lora_A", False),
    ],
)
def test_an_engine_with_shared_factors_refuses_those_that_differ(
    projection: Any, shared: str, named: str, gated: bool
) -> None:
    live = replace(LIVE, shared_outer=True, gated=gated)
    others = [s for s in pair(live, "up_proj", 2, shared="A") if projection == "gate_proj"]
    assert refusal(live, [*pair(live, projection, 2, shared=shared), *others]) == (
        f"{WHERE}: {named} differs from expert to expert, but the engine keeps one for all of them "
        "(--enable-moe-shared-loras).\n  Start vLLM without --enable-moe-shared-loras."
    )


def test_a_rank_without_rows_of_the_experts_has_none_of_lora_b() -> None:
    live = replace(LIVE, wrapper="3d", intermediate_size=0, buffer_intermediate=0)
    stacks = [*pair(live, "gate_proj", 2), *pair(live, "up_proj", 2)]
    assembly = plan_assembly(live, stacks, "split", WHERE)
    assert assembly.factors[assembly.lora_b[0]].rows == 0


def test_a_piece_says_where_it_is_read_and_written_as_slices() -> None:
    stack = ShardStack("x.lora_B", "gate_proj", "lora_B", "BF16", 8, 3, shared=False)
    piece = Piece(stack, range(1, 8, 2), range(4, 8), first_col=5)
    assert piece.source == slice(1, 8, 2)
    assert piece.target == (slice(4, 8, 1), slice(5, 8))
