"""`reshard`: one core call, with progress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorashard.cli import render
from lorashard.reshard.reshard import reshard_shards
from lorashard.shards.directory import read_manifest
from lorashard.shards.names import REPLICATED_NAME, adapter_name, directory_name
from lorashard.shards.placement import Strategy
from lorashard.storage.remote import Location, RemoteFolder


def target(shards: Location, out: Path | None, ep_size: int) -> Path:
    """OUT, or beside SHARDS, or here for remote ones, its name ending in -epN."""
    if out is not None:
        return out
    beside = Path(shards.name if isinstance(shards, RemoteFolder) else os.path.abspath(shards))
    return beside.parent / directory_name(adapter_name(beside.name), ep_size)


def run_reshard(
    shards: Location,
    out: Path,
    ep_size: int,
    strategy: Strategy,
    expert_map: Path | None,
    *,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Location the experts of a shard directory anew; returns what `--json` prints."""
    total = sum(file.digest.size_bytes for file in read_manifest(shards).files.values())
    with render.progress_bar(f"reshard {shards.name}", total, quiet=quiet) as progress:
        manifest = reshard_shards(
            shards,
            out,
            ep_size,
            strategy=strategy,
            expert_map=expert_map,
            force=force,
            progress=progress,
        )
    placement = manifest.placement
    sizes = {name: file.digest.size_bytes for name, file in manifest.files.items()}
    largest = max(size for name, size in sizes.items() if name != REPLICATED_NAME)
    render.say(
        f"{shards}: {placement.num_experts} experts in {len(manifest.modules)} modules on "
        f"{placement.ep_size} ranks, {render.size(sizes[REPLICATED_NAME])} replicated + "
        f"{render.size(largest)} per rank",
        quiet=quiet,
    )
    return {
        "shards": str(shards),
        "revision": shards.revision if isinstance(shards, RemoteFolder) else None,
        "out": str(out),
        "num_experts": placement.num_experts,
        "placement": placement.strategy,
        "ep_size": placement.ep_size,
        "ranks": [list(experts) for experts in placement.ranks],
        "files": sizes,
    }
