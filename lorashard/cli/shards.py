"""The commands that make something else of a shard directory, or bring it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import PlacementError


def merge(
    shards: opt.Shards,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="ADAPTER", help="Target directory.", show_default=False
        ),
    ],
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Give back the source adapter, bit for bit."""
    from lorashard.cli.split import run_merge  # noqa: PLC0415

    result = run_merge(shards, out, force=force, quiet=quiet)
    render.print_result(result, out, as_json=as_json, quiet=quiet)


def convert(
    shards: opt.Shards,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="ADAPTER", help="Target directory.", show_default=False
        ),
    ],
    layout: Annotated[
        opt.LayoutName,
        typer.Option(
            "--layout",
            help="per_expert: a pair for each expert, for vLLM and PEFT with transformers 4. "
            "fused: one pair for all, for PEFT >= 0.19 with transformers 5.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    orientation: Annotated[
        Optional[opt.OrientationName],
        typer.Option(
            "--orientation",
            help="Which way round PEFT has the fused parameters, where no model is named.",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a plain PEFT adapter in the layout of choice, with the same weight changes."""
    from lorashard.cli.convert import run_convert  # noqa: PLC0415

    result = run_convert(shards, out, layout, model, orientation, force=force, quiet=quiet)
    render.print_result(result, out, as_json=as_json, quiet=quiet)


def reshard(
    shards: opt.Shards,
    ep_size: opt.EpSize,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory. [default: SHARDS, its name ending in -epN]",
            show_default=False,
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Place the experts of a shard directory anew, bit for bit, without the source adapter."""
    from lorashard.cli.reshard import run_reshard, target  # noqa: PLC0415
    from lorashard.storage.remote import locate  # noqa: PLC0415

    opt.refuse_two_placements(placement, expert_map)
    place = locate(shards)
    out = target(place, out, ep_size)
    result = run_reshard(place, out, ep_size, placement, expert_map, force=force, quiet=quiet)
    render.print_result(result, out, as_json=as_json, quiet=quiet)


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
            help="Target directory. [default: SHARDS' name]",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch what some ranks need of a shard directory: no other rank's bytes."""
    from lorashard.cli.pull import run_pull  # noqa: PLC0415

    ranks = opt.chosen_ranks(ep_rank, node_ranks)
    if not ranks:
        raise PlacementError("No rank is named.", hint="--ep-rank 3, or --node-ranks 0-7.")
    result = run_pull(shards, ranks, out, force=force, quiet=quiet)
    render.print_result(result, result["out"], as_json=as_json, quiet=quiet)


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
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace shards at a URL; on the Hub a commit always does."),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a shard directory and upload it, with a model card."""
    from lorashard.cli.push import run_push  # noqa: PLC0415

    result = run_push(shards, target, private=private, force=force, quiet=quiet)
    render.print_result(result, result["place"], as_json=as_json, quiet=quiet)
