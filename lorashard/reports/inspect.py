"""What an adapter or a shard directory holds. Reads headers only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorashard.adapter.options import LayoutOptions, LoraBLayout, Orientation
from lorashard.adapter.read import opened_adapter, read_layout
from lorashard.inspect.summary import summarize_adapter, summarize_shards
from lorashard.shards.directory import claims_to_be_shards, read_manifest
from lorashard.shards.held import find_held_ranks
from lorashard.storage.remote import locate


def inspect_path(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    lora_b_layout: LoraBLayout | None = None,
    orientation: Orientation | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """What an adapter or a shard directory holds: the document of `lorashard inspect --json`.

    path: a directory, or hf://owner/name[@revision] or another URL. The rest: as for `split_adapter`.
    Raises AdapterError or ShardError.
    """
    place = locate(path)
    if claims_to_be_shards(place):
        manifest = read_manifest(place)
        held = find_held_ranks(manifest, place) if isinstance(place, Path) else None
        return {
            "path": os.fspath(path),
            **summarize_shards(manifest),
            "held_ranks": None if held is None else list(held),
        }
    options = LayoutOptions(
        num_experts=num_experts, lora_b_layout=lora_b_layout, orientation=orientation
    )
    with opened_adapter(place, allow_pickle=allow_pickle) as source:
        layout = read_layout(source, place, options, model).layout
        index = source.index
        return {"path": os.fspath(path), **summarize_adapter(index.config, index.tensors, layout)}
