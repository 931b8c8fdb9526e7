"""`reshard`: one core call, with progress."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lorashard.cli import render
from lorashard.pipeline import Strategy, read_manifest
from lorashard.plan import REPLICATED_NAME
from lorashard.remote import Place, RemoteFolder
from lorashard.reshard import reshard_shards


def target(shards: Place, out: Path | None, ep_size: int) -> Path:
    """OUT, or beside SHARDS, or here for remote ones, its name ending in -epN."""
    if out is not None:
        return out
    beside = Path(shards.name if isinstance(shards, RemoteFolder) else os.path.abspath(shards))
    stem = re.sub(r"(?<=.)-ep\d+$", "", beside.name)
    return beside.parent / f"{stem}-ep{ep_size}"


def run_reshard(
    shards: Place,
    out: Path,
    ep_size: int,
    strategy: Strategy,
    expert_map: Path | None,
    *,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Place the experts of a shard directory anew; returns what `--json` prints."""
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
