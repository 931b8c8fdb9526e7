"""`pull`: one core call, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorashard.cli import render
from lorashard.shards.directory import needed_files
from lorashard.shards.names import MANIFEST_NAME
from lorashard.transfer.pull import find_shards, pull_shards


def run_pull(
    shards: str, ep_ranks: Sequence[int], out: Path | None, *, force: bool, quiet: bool
) -> dict[str, Any]:
    """Fetch some ranks' files; returns what `--json` prints."""
    found = find_shards(shards)
    source = found.source
    target = Path(source.name) if out is None else out
    files = needed_files(found.manifest, ep_ranks, str(source))
    total = sum(digest.size_bytes for digest in files.values())
    with render.progress_bar(f"pull {source.name}", total, quiet=quiet) as progress:
        manifest = pull_shards(found, target, ep_ranks, force=force, progress=progress)
    experts = sorted({e for k in ep_ranks for e in manifest.placement.ranks[k]})
    render.say(
        f"{source}: experts {render.ids(experts)} of {manifest.placement.num_experts}, "
        f"{render.size(total)}",
        quiet=quiet,
    )
    return {
        "shards": shards,
        "revision": source.revision,
        "out": str(target),
        "ep_ranks": list(ep_ranks),
        "ep_size": manifest.placement.ep_size,
        "files": {name: digest.size_bytes for name, digest in files.items()}
        | {MANIFEST_NAME: (target / MANIFEST_NAME).stat().st_size},
    }
