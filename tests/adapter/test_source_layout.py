"""A source layout is a value; its name in the manifest is one of those that format.md lists."""

from __future__ import annotations

import pytest

from lorashard.adapter.source_layout import SourceLayout

FUSED = SourceLayout(("fused",))
TRANSPOSED = SourceLayout(("fused",), "transposed")
GROUPED = SourceLayout(("fused",), lora_b_layout="grouped_by_expert")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (SourceLayout(("per_expert",)), "per_expert"),
        (SourceLayout(("per_expert", "stacked")), "per_expert+stacked"),
        (SourceLayout(("native",)), "native"),
        (FUSED, "fused"),
        (TRANSPOSED, "fused_transposed"),
        (GROUPED, "fused_grouped_by_expert"),
        (SourceLayout(("fused",), up_without_gate=True), "fused_non_gated"),
        (
            SourceLayout(("stacked", "fused"), "transposed", "grouped_by_expert", True),
            "stacked+fused_transposed_grouped_by_expert_non_gated",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_its_name_has_every_part(layout: SourceLayout, name: str) -> None:
    assert str(layout) == name


def test_peft_stores_fused_parameters_one_way_round_and_rank_major() -> None:
    assert FUSED.is_peft_layout("fused", "standard")
    assert TRANSPOSED.is_peft_layout("fused", "transposed")
    assert SourceLayout(("fused",), up_without_gate=True).is_peft_layout("fused", "standard")
    assert not TRANSPOSED.is_peft_layout("fused", "standard")
    assert not GROUPED.is_peft_layout("fused", "standard")
    assert not FUSED.is_peft_layout("per_expert", "standard")


def test_peft_stores_all_or_no_experts_one_by_one() -> None:
    assert SourceLayout(("per_expert",)).is_peft_layout("per_expert", "standard")
    assert not SourceLayout(("per_expert", "stacked")).is_peft_layout("per_expert", "standard")


def test_only_nemo_s_own_files_need_not_state_r_in_the_config() -> None:
    assert SourceLayout(("native",)).rank_is_from_tensors
    assert not SourceLayout(("stacked", "native")).rank_is_from_tensors
    assert not SourceLayout(("stacked",)).rank_is_from_tensors
