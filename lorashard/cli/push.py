"""`push`: one core call, with progress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lorashard.cli import render
from lorashard.shards.directory import read_manifest
from lorashard.transfer.card import CARD_NAME
from lorashard.transfer.push import push_shards


def run_push(
    shards: Path, target: str, *, private: bool, force: bool, quiet: bool
) -> dict[str, Any]:
    """Upload a shard directory; returns what `--json` prints."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars  # of the upload itself

        disable_progress_bars()
    manifest = read_manifest(shards)
    total = sum(file.digest.size_bytes for file in manifest.files.values())
    with render.progress_bar(f"check {shards.name}", total, quiet=quiet) as progress:
        pushed = push_shards(shards, target, private=private, force=force, progress=progress)
    if pushed.kept_card:
        render.say(f"note: {CARD_NAME} there was edited, and stays as it is.", quiet=quiet)
    render.say(
        f"{shards}: {manifest.placement.ep_size} ranks, {render.size(total)} to {pushed.place}"
        + (f" at {pushed.revision}" if pushed.revision else ""),
        quiet=quiet,
    )
    return {
        "shards": str(shards),
        "place": pushed.place,
        "revision": pushed.revision,
        "files": {name: (shards / name).stat().st_size for name in pushed.names},
        "removed": list(pushed.removed),
        "kept_card": pushed.kept_card,
    }
