"""`lorashard verify`: what is wrong with a shard directory, one line for each finding."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import VerificationError


def verify(
    shards: opt.Shards,
    against: Annotated[
        Optional[str],
        typer.Option(
            "--against",
            metavar="ADAPTER",
            help="Also prove every value against the source adapter.",
            show_default=False,
        ),
    ] = None,
    ep_rank: opt.EpRank = None,
    node_ranks: opt.NodeRanks = None,
    allow_pickle: opt.AllowPickle = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a shard directory, or some of its ranks: structure, placement, digests and values."""
    from lorashard.shards.directory import locate_shards, needed_files  # noqa: PLC0415
    from lorashard.verify.verify import verify_shards  # noqa: PLC0415
    from lorashard.writing.restore import proof_bytes  # noqa: PLC0415

    ep_ranks = opt.chosen_ranks(ep_rank, node_ranks) or None
    located = locate_shards(shards)
    manifest, placement = located.manifest, located.manifest.placement
    needed = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, shards)
    sizes = [file.digest.size_bytes for name, file in manifest.files.items() if name in needed]
    if against is not None:
        sizes += [digest.size_bytes for digest in manifest.source.files.values()]
    elif ep_ranks is None:
        sizes.append(proof_bytes(manifest))
    with render.progress_bar(f"verify {located.place.name}", sum(sizes), quiet=quiet) as bar:
        findings = verify_shards(
            located,
            against=against,
            allow_pickle=allow_pickle,
            ep_ranks=ep_ranks,
            progress=bar.advance,
        )
    if as_json:
        render.print_json({
            "shards": shards,
            "ok": not findings,
            "against": against,
            "ep_ranks": None if ep_ranks is None else list(ep_ranks),
            "findings": list(findings),
        })  # fmt: skip
    elif findings:
        for finding in findings:
            render.print_line(finding)
    elif not quiet:
        proven = "" if against is None else f", every value equal to {against}"
        if against is None and ep_ranks is None and manifest.dtype is not None:
            proven = " (values were cast: only --against proves which expert each one is of)"
        checked = "" if ep_ranks is None else f", ranks {render.ids(ep_ranks)} checked"
        render.print_line(
            f"{shards}: ok, {placement.num_experts} experts on {placement.ep_size} ranks"
            f"{proven}{checked}"
        )
    if findings:
        raise VerificationError(shards, findings)
