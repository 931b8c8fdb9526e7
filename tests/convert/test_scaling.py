"""Every scaling that PEFT can arrive at has an alpha; an r is padded only where that helps."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lorashard.convert.scaling import find_alpha, find_rank_with_alpha
from tests.adapters import Spec, build
from tests.conversions import Work


@given(
    alpha=st.integers(1, 10**6) | st.floats(0.01, 1e6),
    lora_rank=st.integers(1, 512),
    use_rslora=st.booleans(),
)
def test_an_alpha_is_found_for_every_scaling_that_has_one(
    alpha: float, lora_rank: int, use_rslora: bool
) -> None:
    divisor = lora_rank**0.5 if use_rslora else lora_rank
    found = find_alpha(alpha / divisor, lora_rank, use_rslora=use_rslora)
    assert found is not None
    assert found / divisor == alpha / divisor
    if isinstance(alpha, int):
        assert found == alpha
    twice = find_alpha(alpha / lora_rank, 2 * lora_rank, use_rslora=False)
    assert twice is not None
    assert Fraction(twice) == 2 * Fraction(alpha) or twice / (2 * lora_rank) == alpha / lora_rank


def test_doubling_the_rank_keeps_the_scaling_of_rslora(tmp_path: Path) -> None:
    for lora_rank in range(1, 9):
        spec = Spec("L1", rslora=True, lora_rank=lora_rank)
        work = Work(tmp_path / str(lora_rank), build(spec)).split().convert("fused")
        manifest = json.loads((work.split_again() / "lorashard.json").read_bytes())
        before = json.loads((work.shards / "lorashard.json").read_bytes())
        scaling = {s for m in before["modules"].values() for s in m["scaling"].values()}
        assert {s for m in manifest["modules"].values() for s in m["scaling"].values()} == scaling


def test_an_r_without_an_alpha_is_padded_to_one_that_has_one() -> None:
    scalings = [number / 997 for number in range(1, 997)]
    unlucky = next(s for s in scalings if find_alpha(s, 3, use_rslora=True) is None)
    assert find_rank_with_alpha(unlucky, 3, use_rslora=True, module="m") == 4
    assert find_alpha(unlucky, 4, use_rslora=True) == 2 * unlucky


def test_what_is_zero_needs_no_padding() -> None:
    assert find_rank_with_alpha(None, 3, use_rslora=True, module="m") == 3
