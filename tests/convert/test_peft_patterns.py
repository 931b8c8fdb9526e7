"""Every module has its value by PEFT's own rule, and the patterns are few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.convert.peft_patterns import write_patterns
from tests.adapters import Spec, build
from tests.conversions import Work, assert_same_deltas, config_of, deltas
from tests.tiny import contents

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
    for layer in range(2) for expert in range(3) for projection in ("up_proj", "down_proj")
]  # fmt: skip
OTHERS = [f"model.layers.{n}.{m}" for n in range(2) for m in ("self_attn.q_proj", "mlp.gate")]
KEYS = [".*_proj", "q_proj", "mlp.gate", r"experts\.1\..*", r"layers\.0\..*", "gate.weight", ".*"]


def value_by_peft(patterns: dict[str, int], name: str, default: int) -> int:
    other = pytest.importorskip("peft.utils.other")
    return patterns.get(other.get_pattern_key(patterns.keys(), name), default)


@given(data=st.data())
@settings(deadline=None)  # the first example imports PEFT
def test_peft_finds_every_value(data: st.DataObject) -> None:
    values = st.integers(1, 3)
    source = data.draw(st.dictionaries(st.sampled_from(KEYS), values))
    experts = {name: data.draw(values) for name in EXPERTS}
    others = {f"{name}.weight" if "gate" in name and data.draw(st.booleans()) else name:
              data.draw(values) for name in OTHERS}  # fmt: skip
    source_names = {name: name.removesuffix(".weight") for name in others}
    default = data.draw(values)
    patterns = write_patterns(experts, others, source_names, source, default)
    for name, value in (experts | others).items():
        assert value_by_peft(patterns, name, default) == value, name


def test_what_has_the_default_needs_no_pattern() -> None:
    assert write_patterns(dict.fromkeys(EXPERTS, 2), {}, {}, {}, 2) == {}


@pytest.mark.parametrize(
    ("experts", "patterns"),
    [
        ({}, {r"experts\.\d+\.up_proj": 2}),
        ({".experts.1.": 3}, {r"experts\.0\.up_proj": 2, r"experts\.1\.up_proj": 3,
                              r"experts\.2\.up_proj": 2}),
        ({"layers.1.": 3}, {r"model\.layers\.0\.mlp\.experts\.\d+\.up_proj": 2,
                            r"model\.layers\.1\.mlp\.experts\.\d+\.up_proj": 3}),
    ],
    ids=["all-alike", "by-expert", "by-layer"],
)  # fmt: skip
def test_experts_share_a_pattern_where_they_can(
    experts: dict[str, int], patterns: dict[str, int]
) -> None:
    values = {name: 2 for name in EXPERTS if name.endswith("up_proj")}
    for part, value in experts.items():
        values |= {name: value for name in values if part in name}
    assert write_patterns(values, {}, {}, {}, 1) == patterns


def test_a_pattern_of_the_source_that_gives_no_one_a_value_is_dropped() -> None:
    source = {"k_proj": 7, "q_proj": 5, ".*_proj": 6}
    others = {OTHERS[0]: 5}
    assert write_patterns({}, others, {OTHERS[0]: OTHERS[0]}, source, 2) == {"q_proj": 5}


def test_a_module_with_a_new_name_gets_a_pattern_for_it() -> None:
    name, new_name = "model.layers.0.mlp.gate", "model.layers.0.mlp.gate.weight"
    patterns = write_patterns({}, {new_name: 5}, {new_name: name}, {"mlp.gate": 5}, 2)
    assert list(patterns.items()) == [(r"model\.layers\.0\.mlp\.gate\.weight", 5), ("mlp.gate", 5)]


def test_patterns_for_other_modules_stay_theirs(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {r".*\.experts\.1\..*": 3, r".*_proj": 2},
        "alpha_pattern": {r".*\.experts\.1\..*": 6, r"q_proj": 7, r".*_proj": 5},
    }
    spec = Spec("L1", lora_ranks={1: 3}, extras=True, config=patterns, fill="random")
    work = Work(tmp_path, build(spec)).split().convert("per_expert")
    assert contents(work.out) == contents(work.source)
    spec = replace(spec, layout="L2", lora_ranks={}, config={"alpha_pattern": {r".*_proj": 5}})
    work = Work(tmp_path / "fused", build(spec)).split().convert("per_expert")
    config = config_of(work)
    assert list(config["alpha_pattern"].items()) == [
        (r"experts\.\d+\.gate_proj", 5), (r"experts\.\d+\.up_proj", 5),
        (r"experts\.\d+\.down_proj", 5), (r".*_proj", 5),
    ]  # fmt: skip
    assert_same_deltas(deltas(work.shards), deltas(work.split_again()))
