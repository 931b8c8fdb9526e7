"""What a caller gives as a placement is read as the JSON of docs/format.md, or refused like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import PlacementError
from lorashard.shards.expert_map import read_expert_map
from lorashard.shards.placement import explicit_placement
from tests.tiny import save_adapter


@pytest.mark.parametrize("given", [((0, 2), (3, 1)), [[0, 2], (3, 1)]])
def test_rows_of_any_sequence_are_lists_of_json(given: Any) -> None:
    assert read_expert_map(given) == [[0, 2], [3, 1]]


def test_another_placement_is_read_with_its_layers() -> None:
    layers = {"m": {"ranks": [[3, 2], [1, 0]]}}
    placement = explicit_placement({"ranks": [[0, 1], [2, 3]], "layers": layers}, 4, 2)
    assert explicit_placement(read_expert_map(placement), 4, 2) == placement


@pytest.mark.parametrize("given", [5, [5, 6], True, [None]])
def test_what_is_no_map_is_refused_like_other_mistakes(tmp_path: Path, given: Any) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with pytest.raises(PlacementError, match="list of"):
        split_adapter(adapter, tmp_path / "out", SplitRequest(2, expert_map=given))
