"""A map has each expert where the placement has it, with the bytes that were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.options import LayoutOptions
from lorashard.inspect.picture import (
    LEVELS,
    NOT_HERE,
    UNTRAINED,
    ModuleExperts,
    experts_of_layout,
    experts_of_shards,
    groups_of_modules,
    map_of_modules,
    map_of_ranks,
)
from lorashard.shards.placement import linear_placement
from tests.adapters import LAYOUTS, Spec, build
from tests.strategies import layout_of

MODULE = "model.layers.0.mlp.experts"


def module(name: str = "a", *, ranks=((0, 1), (2, 3)), sizes=(10, 10, 10, 10), untrained=()):
    return ModuleExperts(name, ranks, sizes, frozenset(untrained))


def test_bytes_are_those_of_the_expert_s_own_tensors():
    adapter = build(Spec(lora_ranks={1: 1}, experts=(0, 1, 2)))
    (experts,) = experts_of_layout(layout_of(adapter, num_experts=4))
    own = [
        sum(t.nbytes for name, t in adapter.tensors.items() if f"experts.{e}." in name)
        for e in range(4)
    ]
    assert list(experts.trained_bytes) == own
    assert experts.untrained == {3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_have_the_picture_of_their_adapter(layout: str, tmp_path: Path):
    adapter = build(Spec(layout, num_layers=2))
    request = SplitRequest(2, options=LayoutOptions(**adapter.options))
    manifest = split_adapter(adapter.write(tmp_path / "a"), tmp_path / "out", request)
    described = layout_of(adapter)
    expected = experts_of_layout(described, linear_placement(described.num_experts, 2))
    assert experts_of_shards(manifest) == expected
    has_own = any(not stack.shared for module in described.modules for stack in module.stacks)
    assert all(any(module.trained_bytes) == has_own for module in expected)


def test_a_cast_changes_the_bytes(tmp_path: Path):
    adapter = build(Spec()).write(tmp_path / "a")
    whole = experts_of_shards(split_adapter(adapter, tmp_path / "1", SplitRequest(2)))
    half = experts_of_shards(
        split_adapter(adapter, tmp_path / "2", SplitRequest(2, dtype="bfloat16"))
    )
    assert half == experts_of_layout(layout_of(build(Spec())), linear_placement(4, 2), dtype="BF16")
    assert [2 * size for size in half[0].trained_bytes] == list(whole[0].trained_bytes)


def test_a_damaged_manifest_still_has_a_picture(tmp_path: Path):
    """`inspect` shows what is said; `verify` says whether it is so."""
    from lorashard.shards.directory import read_manifest

    split_adapter(build(Spec()).write(tmp_path / "a"), tmp_path / "out", SplitRequest(2))
    path = tmp_path / "out" / "lorashard.json"
    document = json.loads(path.read_text())
    info = document["modules"][MODULE]
    info["expert_lora_ranks"] = {"up_proj": {"99": 1}}
    info["absent_experts"] = [99]
    file = document["files"]["ep-00000-of-00002.safetensors"]
    file["tensors"] = {"odd": {"dtype": "F4", "shape": [], "offset": 0, "size": 0}}
    path.write_text(json.dumps(document))
    (experts,) = experts_of_shards(read_manifest(tmp_path / "out"))
    assert experts.trained_bytes == (0, 0, 0, 0)


def test_a_rank_s_row_has_its_experts_and_no_others():
    first, second = map_of_ranks([module()], 9).rows
    assert (first.experts, second.experts) == ((0, 1), (2, 3))
    assert first.levels == (LEVELS, LEVELS, NOT_HERE, NOT_HERE)
    assert second.levels == (NOT_HERE, NOT_HERE, LEVELS, LEVELS)
    assert (first.trained_bytes, first.partly) == (20, frozenset())


def test_shades_go_by_bytes():
    (row,) = map_of_ranks([module(ranks=((0, 1, 2, 3),), sizes=(100, 20, 21, 1))], 9).rows
    assert row.levels == (5, 1, 2, 1)


def test_what_all_experts_share_leaves_them_trained():
    """Both factors shared: an expert has no bytes of its own, and is trained."""
    (row,) = map_of_ranks([module(ranks=((0, 1, 2, 3),), sizes=(0, 0, 0, 0))], 9).rows
    assert row.levels == (1, 1, 1, 1)


def test_slot_order_is_kept_where_all_modules_have_it():
    swapped = ((3, 0), (1, 2))
    assert map_of_ranks([module(ranks=swapped)] * 2, 9).rows[0].experts == (3, 0)
    either = map_of_ranks([module(ranks=swapped), module(ranks=((0, 1), (2, 3)))], 9)
    assert either.rows[0].experts == (0, 1, 3)


def test_what_is_so_in_some_modules_only_is_partly_so():
    elsewhere = module("b", ranks=((0, 2), (1, 3)))
    first, _ = map_of_ranks([module("a"), elsewhere], 9).rows
    assert first.partly == {1, 2}
    less = module("b", sizes=(0, 10, 10, 10), untrained=(0,))
    first, _ = map_of_ranks([module("a"), less], 9).rows
    assert (first.partly, first.levels[0]) == ({0}, 3)


def test_untrained_everywhere_is_not_partly_so():
    first, _ = map_of_ranks([module(sizes=(0, 10, 10, 10), untrained=(0,))] * 2, 9).rows
    assert (first.levels[0], first.partly) == (UNTRAINED, frozenset())


def test_modules_that_differ_have_maps_of_their_own():
    less = module("b", sizes=(0, 10, 10, 10), untrained=(0,))
    groups = groups_of_modules([module("a"), less, module("c")])
    assert [[one.name for one in group] for group in groups] == [["a", "c"], ["b"]]


def test_runs_of_modules_that_are_alike_share_a_row():
    modules = [
        module("a", ranks=()),
        module("b", ranks=()),
        module("c", ranks=(), sizes=(5, 1, 5, 5)),
    ]
    rows = map_of_modules(modules, 9).rows
    assert [(row.name, row.trained_bytes) for row in rows] == [("a (+1)", 80), ("c", 16)]
    assert rows[1].levels == (3, 1, 3, 3)


def test_a_map_of_very_many_ranks_has_the_first_of_them():
    ranks = tuple((e,) if e < 4 else () for e in range(60_000))
    picture = map_of_ranks([module(ranks=ranks)], 3)
    assert (picture.num_rows, len(picture.rows)) == (60_000, 3)
    assert picture.rows[2].experts == (2,)
