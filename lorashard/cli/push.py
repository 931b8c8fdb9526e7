"""`lorashard push`: a shard directory -> the Hub, or a folder behind another URL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt


def push(
    shards: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="A shard directory.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="hf://owner/name[@branch][/folder], or another URL.",
            show_default=False,
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, make it private.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace shards at a URL; on the Hub, a new commit always does."
        ),
    ] = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a shard directory and upload it, with a model card."""
    from lorashard.shards.directory import read_manifest  # noqa: PLC0415
    from lorashard.shards.names import MANIFEST_NAME  # noqa: PLC0415
    from lorashard.transfer.push import push_shards  # noqa: PLC0415
    from lorashard.uploading.card import CARD_NAME  # noqa: PLC0415
    from lorashard.uploading.upload import is_on_hub  # noqa: PLC0415

    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars  # those of the upload itself

        disable_progress_bars()
    if is_on_hub(target):
        state = f"{target} is as it was: an upload to the Hub is one commit, at the end."
    else:
        state = f"{target} is incomplete if it has no {MANIFEST_NAME}. Push again."
    render.if_interrupted(lambda: state)
    manifest = read_manifest(shards)
    total = sum(file.digest.size_bytes for file in manifest.files.values())
    label, passes = ("check", 1) if is_on_hub(target) or dry_run else ("push", 2)
    with bars.progress_bar(f"{label} {shards.name}", passes * total, quiet=quiet) as bar:
        pushed = push_shards(
            shards, target, private=private, force=force, dry_run=dry_run, progress=bar.advance
        )
    if pushed.removed:
        gone = "would be removed" if dry_run else "removed"
        render.say(f"note: {gone} there: {', '.join(pushed.removed)}", quiet=quiet)
    if pushed.kept_card:
        render.say(f"note: {CARD_NAME} there was edited; it is left as it is.", quiet=quiet)
    render.say(
        f"{shards}: {manifest.placement.ep_size} ranks, {render.size(total)} to {pushed.place}"
        + (f" at {pushed.revision}" if pushed.revision else "")
        + (" (dry run, nothing uploaded)" if dry_run else ""),
        quiet=quiet,
    )
    result = {
        "shards": str(shards),
        "place": pushed.place,
        "revision": pushed.revision,
        "files": {name: (shards / name).stat().st_size for name in pushed.names},
        "removed": list(pushed.removed),
        "kept_card": pushed.kept_card,
        "dry_run": dry_run,
    }
    render.print_result(result, pushed.place, as_json=as_json, quiet=quiet)
