"""An upload as `push` and `split -o URL` show it: a bar, what changed there, and its part of the JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashard.cli import bars, render

if TYPE_CHECKING:
    from lorashard.uploading.survey import Uploaded


def push_with_bar(
    shards: Path, target: str, *, name: str, again: str, private: bool, force: bool,
    dry_run: bool, quiet: bool,
) -> Uploaded:  # fmt: skip
    """Check and upload a shard directory. Raises what `push_shards` raises.

    name: of the shards, on the bar. again: what to do if it is interrupted.
    """
    from lorashard.shards.directory import read_manifest  # noqa: PLC0415
    from lorashard.shards.names import MANIFEST_NAME  # noqa: PLC0415
    from lorashard.transfer.push import push_shards  # noqa: PLC0415
    from lorashard.uploading.survey import is_on_hub  # noqa: PLC0415

    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars  # those of the upload itself

        disable_progress_bars()
    if is_on_hub(target):
        state = f"{target} is as it was: an upload to the Hub is one commit, at the end."
    else:
        state = f"{target} is incomplete if it has no {MANIFEST_NAME}. {again}"
    render.if_interrupted(lambda: state)
    total = sum(file.digest.size_bytes for file in read_manifest(shards).files.values())
    label, passes = ("check", 1) if is_on_hub(target) or dry_run else ("push", 2)
    with bars.progress_bar(f"{label} {name}", passes * total, quiet=quiet) as bar:
        return push_shards(
            shards, target, private=private, force=force, dry_run=dry_run, progress=bar.advance
        )


def say_changes(pushed: Uploaded, *, dry_run: bool, quiet: bool) -> None:
    """Say what an upload has removed or left alone at its place, or would."""
    from lorashard.uploading.card import CARD_NAME  # noqa: PLC0415

    if pushed.removed:
        gone = "would be removed" if dry_run else "removed"
        render.say(f"note: {gone} there: {', '.join(pushed.removed)}", quiet=quiet)
    if pushed.kept_card:
        render.say(f"note: {CARD_NAME} there was edited; it is left as it is.", quiet=quiet)


def pushed_json(pushed: Uploaded) -> dict[str, Any]:
    """What was done at the place."""
    return {
        "place": pushed.place,
        "revision": pushed.revision,
        "removed": list(pushed.removed),
        "kept_card": pushed.kept_card,
    }
