"""Every tensor of the new file is planned once, and PEFT's own config is kept where it is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorashard.convert.plan import ConversionPlan, plan_conversion
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from lorashard.shards.placement import linear_placement
from lorashard.shards.plan import build_plan
from tests.adapters import Adapter
from tests.conversions import peft_target
from tests.layouts import built
from tests.strategies import index_of, layout_of


def planned(adapter: Adapter, layout: str, **target: Any) -> ConversionPlan:
    source = layout_of(adapter)
    shard_plan = build_plan(source, linear_placement(source.num_experts, 2), None)
    config = index_of(adapter).config
    raw = b'{"r": 2, "lora_alpha": 4, "peft_version": "0.21.2", "mark": "the source\'s"}'
    return plan_conversion(source, shard_plan, config, raw, peft_target(layout, **target))


def test_what_belongs_to_no_expert_is_copied() -> None:
    adapter = built(extras=True)
    copied = {t.name for t in planned(adapter, "fused").tensors if isinstance(t, TensorEntry)}
    assert copied == set(adapter.replicated)


def test_the_size_is_that_of_header_and_tensors() -> None:
    plan = planned(built("L2"), "per_expert")
    experts = 4 * 3 * 2 * (6 + 5)  # experts, projections, r, in + out
    assert plan.size_bytes == len(plan.header) + 4 * experts


@pytest.mark.parametrize(
    ("source", "layout", "target"),
    [("L1", "per_expert", {}), ("L2", "fused", {}), ("L3", "fused", {"orientation": "transposed"})],
)
def test_a_config_that_peft_wrote_for_this_layout_is_kept(
    source: str, layout: str, target: dict[str, Any]
) -> None:
    assert b"the source's" in planned(built(source), layout, **target).config
    assert b'"target_modules"' not in planned(built(source), layout, **target).config


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [
        (built("L2"), "per_expert"), (built("L6"), "fused"), (built("L3"), "fused"),
        (built("L10"), "per_expert"), (built("L1", peft_version=None), "per_expert"),
        (built("L1", experts=(0, 2)), "per_expert"),
    ],
    ids=["fused", "grouped", "transposed", "stacked", "not-by-peft", "some-experts"],
)  # fmt: skip
def test_any_other_config_is_written_anew(adapter: Adapter, layout: str) -> None:
    assert b'"target_modules"' in planned(adapter, layout).config


def test_two_tensors_of_one_name_are_refused() -> None:
    # Mixtral's fused experts are renamed to where these per-expert ones are.
    fused, per_expert = built("L10"), built("L1-w")
    both = replace(fused, tensors=fused.tensors | per_expert.tensors)
    with pytest.raises(LayoutError, match=r"would be called .*block_sparse_moe\.experts\.0\.w1"):
        planned(both, "per_expert", model_names="mixtral")
