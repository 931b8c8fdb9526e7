"""`lorashard pull`: what some ranks need of a shard directory elsewhere -> a local one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.errors import PlacementError


def pull(
    shards: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS",
            help="A shard directory: hf://owner/name[@revision], another URL, or a directory.",
            show_default=False,
        ),
    ],
    ep_rank: opt.EpRank = None,
    node_ranks: opt.NodeRanks = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory. [default: the name of SHARDS]",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch what some ranks need of a shard directory, and no other rank's bytes."""
    from lorashard.shards.directory import needed_files  # noqa: PLC0415
    from lorashard.shards.names import MANIFEST_NAME  # noqa: PLC0415
    from lorashard.transfer.pull import find_shards, plan_pull, pull_shards  # noqa: PLC0415

    ep_ranks = opt.chosen_ranks(ep_rank, node_ranks)
    if not ep_ranks:
        raise PlacementError("No rank is named.", hint="Use --ep-rank 3 or --node-ranks 0-7.")
    found = find_shards(shards)
    source = found.source
    target = Path(source.name) if out is None else out
    manifest = found.manifest
    if dry_run:
        sizes = dict(plan_pull(found, target, ep_ranks, force=force))
    else:
        files = needed_files(manifest, ep_ranks, source)
        sizes = {name: digest.size_bytes for name, digest in files.items()}
    total = sum(sizes.values())
    if not dry_run:
        render.if_interrupted(
            lambda: "what was fetched is kept, and the same command goes on from there."
        )
        with bars.progress_bar(f"pull {source.name}", total, quiet=quiet) as bar:
            pull_shards(found, target, ep_ranks, force=force, progress=bar.advance)
        sizes[MANIFEST_NAME] = (target / MANIFEST_NAME).stat().st_size
    experts = sorted({e for k in ep_ranks for e in manifest.placement.ranks[k]})
    render.say(
        f"{source}: experts {render.ids(experts)} of {manifest.placement.num_experts}, "
        f"{render.size(total)}" + (" (dry run, nothing written)" if dry_run else ""),
        quiet=quiet,
    )
    result = {
        "shards": shards,
        "revision": source.revision,
        "out": str(target),
        "ep_ranks": list(ep_ranks),
        "ep_size": manifest.placement.ep_size,
        "files": sizes,
        "dry_run": dry_run,
    }
    render.print_result(result, target, as_json=as_json, quiet=quiet)
