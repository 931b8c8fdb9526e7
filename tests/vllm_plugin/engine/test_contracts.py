"""What the plugin relies on holds in real vLLM releases, and what does not hold is named."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.patched_answers import answers
from tests.vllm_release import PLUGIN_RELEASES

pytestmark = pytest.mark.parametrize("release", PLUGIN_RELEASES)


def test_every_tested_release_is_what_the_plugin_relies_on(release: str) -> None:
    found = answers(release)["contracts"]
    assert found["this release"] == found["this release again"] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("signature", "other_parameters has the parameters self, name, lora_a, lora_b"),
        ("attribute", "LRUCacheLoRAModelManager has no packed_modules"),
        ("sharded twice", "model.layers.0.mlp.experts is sharded by tensor parallelism and by"),
        ("packing", "LRUCacheLoRAModelManager changes expert weights that are packed already"),
    ],
)
def test_a_release_that_differs_is_described_in_one_sentence(
    release: str, change: str, expected: str
) -> None:
    (found,) = answers(release)["contracts"][change]
    assert found.startswith(expected)


def test_patches_that_are_not_in_place_come_first_and_alone(release: str) -> None:
    found = answers(release)["contracts"]
    assert found["patches"] == found["patches and signature"] == ["a patch is not in place"]
