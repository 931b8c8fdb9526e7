"""What names and shapes alone say of a source, by the second reading: as `split` has it."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.verify.reference.patterns import Patterns
from lorashard.verify.reference.pieces import Facts, plain_key
from lorashard.verify.reference.projections import SourceReading, read_source

E, R, H, I = 4, 2, 6, 5  # noqa: E741 - experts, lora_rank, hidden and intermediate size
MODULE = "model.layers.0.mlp.experts"
QUERY = "model.layers.0.self_attn.q_proj.lora_A.weight"
Shapes = dict[str, tuple[int, ...]]


def read(shapes: Shapes, config: dict[str, Any] | None = None, **options: Any) -> SourceReading:
    config = {"r": R, "lora_alpha": 8, "peft_version": "0.21.2"} | (config or {})
    patterns = Patterns("rank_pattern", {}), Patterns("alpha_pattern", {})
    told = {"hidden_size": None, "intermediate_size": None, "orientation": None} | options
    return read_source(shapes, Facts(config, *patterns, E, grouped_by_expert=False, **told))


def sizes(reading: SourceReading) -> dict[str, tuple[int, int]]:
    """Projection -> (in features, out features) of the one module."""
    assert reading.problems == ()
    (projections,) = reading.modules.values()
    return {name: (p.in_features, p.out_features) for name, p in projections.items()}


def pair(name: str, lora_a: tuple[int, ...], lora_b: tuple[int, ...]) -> Shapes:
    return {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}


def down_alone(width: int = H) -> Shapes:
    """A fused pair that is a down_proj, or a transposed gate_up_proj if it has 2 I and H features."""
    return pair(MODULE, (E * R, I), (width, R * E))


@pytest.mark.parametrize("target", ["experts.down_proj", f"{MODULE}.down_proj", "moe.down_proj"])
def test_target_parameters_count_by_their_last_word_where_the_module_has_another_name(
    target: str,
) -> None:
    reading = read(down_alone(), {"target_parameters": [target]}, orientation="standard")
    assert sizes(reading) == {"down_proj": (I, H)}


def test_target_parameters_of_another_layer_count_for_that_layer() -> None:
    targets = ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.up_proj"]
    reading = read(down_alone(), {"target_parameters": targets}, orientation="standard")
    assert sizes(reading) == {"down_proj": (I, H)}


def test_the_orientation_counts_before_the_attention() -> None:
    shapes = down_alone() | {QUERY: (R, I)}
    reading = read(shapes, {"target_parameters": ["down_proj"]}, orientation="standard")
    assert sizes(reading) == {"down_proj": (I, H)}


def test_an_attention_of_another_width_rules_nothing_out() -> None:
    shapes = down_alone(width=I) | {QUERY: (R, 7)}
    (problem,) = read(shapes, {"target_parameters": ["down_proj"]}).problems
    assert "several readings fit" in problem


def test_a_gate_up_of_an_odd_size_is_the_other_way_round() -> None:
    shapes = pair(MODULE, (E * R, 2 * I), (H + 1, R * E)) | {QUERY: (R, 2 * I)}
    reading = read(shapes, {"target_parameters": ["experts.gate_up_proj"]})
    assert sizes(reading) == {"gate_up_proj": (H + 1, 2 * I)}


def test_down_may_be_the_inner_parameter() -> None:
    inner = pair(f"{MODULE}.base_layer", (E * R, I), (H, R * E))
    outer = pair(MODULE, (E * R, H), (2 * I, R * E))
    assert sizes(read(inner | outer)) == {"down_proj": (I, H), "gate_up_proj": (H, 2 * I)}


def test_a_stack_with_as_many_features_as_experts_may_have_the_experts_last() -> None:
    shapes = pair(f"{MODULE}.down_proj", (E, R, I), (E, R, E))
    assert sizes(read(shapes)) == {"down_proj": (I, E)}


def test_where_r_is_the_number_of_experts_too_the_first_axis_is_that_of_experts() -> None:
    reading = read(pair(f"{MODULE}.down_proj", (E, E, I), (E, E, E)), {"r": E})
    piece = reading.modules[MODULE]["down_proj"].lora_b.whole
    assert piece is not None
    assert piece.kind == "stack"


def test_the_r_of_nemos_own_orientation_is_that_of_the_tensors() -> None:
    shapes = {
        f"{MODULE}.lora_down_A": (E, I, R + 1),
        f"{MODULE}.lora_down_B": (E, R + 1, H),
    }
    assert read(shapes).modules[MODULE]["down_proj"].scaling == (8 / (R + 1),) * E


@pytest.mark.parametrize("leaf", ["w2", "up_proj"])
def test_an_empty_stack_other_than_w3_does_not_say_that_there_is_no_gate(leaf: str) -> None:
    shapes = pair(f"{MODULE}.w1", (E, R, H), (E, I, R)) | pair(
        f"{MODULE}.{leaf}", (0, R, H), (0, I, R)
    )
    assert sizes(read(shapes)) == {"gate_proj": (H, I)}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("x.lora_A.lora_A.weight", "x.lora_A.lora_A.weight"),
        ("x.lora_A.lora_B.weight", "x.lora_A.lora_B.weight"),
        ("x.lora_A.default.weight", "x.lora_A.weight"),
    ],
)
def test_a_module_called_like_a_factor_is_no_name_of_an_adapter(name: str, plain: str) -> None:
    assert plain_key(name) == plain
