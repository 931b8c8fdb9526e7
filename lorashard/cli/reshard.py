"""`lorashard reshard`: a shard directory -> one with another placement."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.upload import opened_output, output_json, say_changes, upload_with_bar

if TYPE_CHECKING:
    from lorashard.storage.remote import Location


def reshard(
    shards: opt.Shards,
    ep_size: opt.EpSize,
    out: Annotated[
        Optional[str],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory; or where to upload the shards as `push` does: hf://owner/name or "
            "another URL. [default: SHARDS, its name with the new N]",
            show_default=False,
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    force: opt.Force = False,
    private: opt.Private = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Redistribute the experts of a shard directory, bit for bit, without the source adapter."""
    from lorashard.reshard.reshard import plan_reshard, reshard_shards  # noqa: PLC0415
    from lorashard.shards.directory import locate_shards  # noqa: PLC0415
    from lorashard.shards.names import REPLICATED_NAME  # noqa: PLC0415
    from lorashard.storage.remote import RemoteFolder, locate  # noqa: PLC0415
    from lorashard.uploading.contents import ShardsContent  # noqa: PLC0415
    from lorashard.writing.restore import proof_bytes  # noqa: PLC0415

    opt.refuse_two_placements(placement, expert_map)
    place = locate(shards)
    target = str(_default_target(place, ep_size)) if out is None else out
    content, uploaded = ShardsContent(ep_size), None
    sizes: Mapping[str, int]
    with opened_output(target, content, private=private, force=force) as (path, output):
        located = locate_shards(place)
        if dry_run:
            placed, sizes = plan_reshard(
                located, path, ep_size, strategy=placement, expert_map=expert_map, force=force
            )
            uploaded = None if output is None else output.preview()
        else:
            total = sum(file.digest.size_bytes for file in located.manifest.files.values())
            total += proof_bytes(located.manifest)
            with bars.progress_bar(f"reshard {place.name}", total, quiet=quiet) as bar:
                manifest = reshard_shards(
                    located,
                    path,
                    ep_size,
                    strategy=placement,
                    expert_map=expert_map,
                    force=force,
                    progress=bar.advance,
                )
            placed = manifest.placement
            sizes = {name: file.digest.size_bytes for name, file in manifest.files.items()}
            if output is not None:
                uploaded = upload_with_bar(output, path, name=place.name, quiet=quiet)
    say_changes(uploaded, dry_run=dry_run, quiet=quiet)
    largest = max(size for name, size in sizes.items() if name != REPLICATED_NAME)
    render.say(
        f"{place}: {placed.num_experts} experts in {len(located.manifest.modules)} modules on "
        f"{placed.ep_size} ranks, {render.size(sizes[REPLICATED_NAME])} replicated + "
        f"{render.size(largest)} per rank" + (" (dry run, nothing written)" if dry_run else ""),
        quiet=quiet,
    )
    result = {
        "shards": str(place),
        "revision": place.revision if isinstance(place, RemoteFolder) else None,
        **output_json(target, uploaded),
        "num_experts": placed.num_experts,
        "placement": placed.strategy,
        "ep_size": placed.ep_size,
        "ranks": [list(experts) for experts in placed.ranks],
        "files": dict(sizes),
        "dry_run": dry_run,
    }
    render.print_result(result, result["out"], as_json=as_json, quiet=quiet)


def _default_target(shards: Location, ep_size: int) -> Path:
    """Beside local shards, in the current directory for remote ones; named as `split` names them."""
    from lorashard.shards.names import adapter_name, directory_name  # noqa: PLC0415
    from lorashard.storage.remote import RemoteFolder  # noqa: PLC0415

    beside = Path(shards.name if isinstance(shards, RemoteFolder) else os.path.abspath(shards))
    return beside.parent / directory_name(adapter_name(beside.name), ep_size)
