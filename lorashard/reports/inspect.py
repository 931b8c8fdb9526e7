"""What an adapter or a shard directory holds. Reads headers only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.options import LayoutOptions, LoraBLayout, Orientation
from lorashard.adapter.read import opened_adapter, read_layout
from lorashard.inspect.picture import ModuleExperts, experts_of_layout, experts_of_shards
from lorashard.inspect.summary import summarize_adapter, summarize_shards
from lorashard.shards.directory import claims_to_be_shards, locate_shards
from lorashard.shards.held import find_held_ranks
from lorashard.shards.manifest import Manifest
from lorashard.storage.remote import locate


@dataclass(frozen=True, slots=True)
class InspectedPath:
    """The document of a path, and what it is of."""

    document: dict[str, Any]
    found: AdapterLayout | Manifest

    def experts(self) -> tuple[ModuleExperts, ...]:
        """The experts of each module, as a page draws them."""
        if isinstance(self.found, Manifest):
            return experts_of_shards(self.found)
        return experts_of_layout(self.found)


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
    options = LayoutOptions(
        num_experts=num_experts, lora_b_layout=lora_b_layout, orientation=orientation
    )
    return examine_path(path, options, model=model, allow_pickle=allow_pickle).document


def examine_path(
    path: str | os.PathLike[str],
    options: LayoutOptions,
    *,
    model: str | os.PathLike[str] | None,
    allow_pickle: bool,
) -> InspectedPath:
    """The same, with what a page is drawn from."""
    place = locate(path)
    if claims_to_be_shards(place):
        shards = locate_shards(place)
        manifest = shards.manifest
        held = find_held_ranks(manifest, place) if isinstance(place, Path) else None
        document = {
            "path": os.fspath(path),
            **summarize_shards(manifest),
            "manifest_changed": shards.was_changed,
            "held_ranks": None if held is None else list(held),
        }
        return InspectedPath(document, manifest)
    with opened_adapter(place, allow_pickle=allow_pickle) as source:
        layout = read_layout(source, place, options, model).layout
        index = source.index
        summary = summarize_adapter(index.config, index.tensors, layout)
        return InspectedPath({"path": os.fspath(path), **summary}, layout)
