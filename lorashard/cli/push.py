"""`lorashard push`: a shard directory -> the Hub, or a folder behind another URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.cli.upload import push_with_bar, say_changes, upload_json


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

    manifest = read_manifest(shards)
    pushed = push_with_bar(
        shards, target, private=private, force=force, dry_run=dry_run, quiet=quiet
    )
    say_changes(pushed, dry_run=dry_run, quiet=quiet)
    total = sum(file.digest.size_bytes for file in manifest.files.values())
    render.say(
        f"{shards}: {manifest.placement.ep_size} ranks, {render.size(total)} to {pushed.place}"
        + (f" at {pushed.revision}" if pushed.revision else "")
        + (" (dry run, nothing uploaded)" if dry_run else ""),
        quiet=quiet,
    )
    result = {
        "shards": str(shards),
        **upload_json(pushed),
        "files": {name: (shards / name).stat().st_size for name in pushed.names},
        "dry_run": dry_run,
    }
    render.print_result(result, pushed.place, as_json=as_json, quiet=quiet)
