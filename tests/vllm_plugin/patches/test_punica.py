"""How much room the sorted token ids need, and in which releases; the calls: layers.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.vllm_plugin.patches.punica import _padded
from tests.vllm_plugin.patched_answers import answers, number
from tests.vllm_release import PLUGIN_RELEASES


@given(
    ids=st.lists(st.integers(0, 11), min_size=1, max_size=60),
    block_size=st.sampled_from([1, 2, 16, 64]),
)
def test_every_expert_s_tokens_fit_padded_to_whole_blocks(ids: list[int], block_size: int) -> None:
    tokens, blocks = _padded(len(ids), 12, block_size)
    blocks_of_experts = sum(-(-count // block_size) for count in Counter(ids).values())
    assert blocks_of_experts * block_size <= tokens
    assert blocks_of_experts <= blocks
    assert blocks == -(-tokens // block_size)


def test_few_tokens_need_no_more_than_a_block_each() -> None:
    assert _padded(num_ids=3, num_experts=128, block_size=64) == (3 * 64, 3)
    assert _padded(num_ids=4096, num_experts=8, block_size=64) == (4096 + 8 * 63, 72)


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_releases_to_0_20_2_translate_ids_that_nothing_has_written(release: str) -> None:
    assert answers(release)["needed"]["punica"] == (number(release) <= (0, 20, 2))
