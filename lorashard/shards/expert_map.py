"""An explicit placement as a caller gives it -> what `explicit_placement` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from lorashard.shards.placement import Placement, Ranks
from lorashard.storage.small_files import read_json

# A JSON file, its parsed content (docs/format.md has the forms), or the placement of other shards.
ExpertMap = Union[str, "os.PathLike[str]", Mapping[str, Any], Sequence[Sequence[int]], Placement]


def read_expert_map(given: ExpertMap | None) -> object:
    """The map as parsed JSON; None for None. Raises AdapterError for a file that cannot be read."""
    if isinstance(given, (str, os.PathLike)):
        return read_json(Path(given))
    if isinstance(given, Placement):
        return {
            "num_experts": given.num_experts,
            "ranks": _as_lists(given.ranks),
            "layers": {name: {"ranks": _as_lists(r)} for name, r in given.layers.items()},
        }
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Sequence):
        return [list(row) if isinstance(row, Sequence) else row for row in given]
    return given  # what is no map is refused with the other mistakes


def _as_lists(ranks: Ranks) -> list[list[int]]:
    return [list(experts) for experts in ranks]
