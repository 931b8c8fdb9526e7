"""The warm-up's dummies of real MoE layers: H = 16, I = 9, r = 4, and 4 or 0 experts per rank."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.patched_answers import answers, number
from tests.vllm_release import PLUGIN_RELEASES

every_release = pytest.mark.parametrize("release", PLUGIN_RELEASES)


def shapes(kind: str, slots: int) -> list[list[list[int]]]:
    """lora_a and lora_b of the parts that set_lora takes."""
    down = [[slots, 4, 9], [slots, 16, 4]]
    if kind == "3d":
        return [[[slots, 4, 16], [slots, 18, 4]], down]
    gate_or_up = [[slots, 4, 16], [slots, 9, 4]]
    return [gate_or_up, down, gate_or_up]


@every_release
@pytest.mark.parametrize("kind", ["2d", "3d", "non-gated"])
def test_a_rank_without_experts_has_a_dummy_of_no_slots(release: str, kind: str) -> None:
    found = answers(release)["dummies"][f"{kind}, 1 experts"]
    assert found == {"shapes": shapes(kind, 0), "zero": True}


@every_release
@pytest.mark.parametrize("kind", ["2d", "3d", "non-gated"])
def test_where_vllm_cannot_make_a_dummy_it_has_the_local_experts_alone(
    release: str, kind: str
) -> None:
    found = answers(release)["dummies"][f"{kind}, 8 experts"]
    if number(release) > (0, 21, 0):
        assert found is None, "vLLM makes it itself"
    else:
        assert found == {"shapes": shapes(kind, 4), "zero": True}
