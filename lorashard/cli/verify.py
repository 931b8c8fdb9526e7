"""`lorashard verify`: what is wrong with a shard directory, one line for each finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.several import look_at_each
from lorashard.errors import LorashardError, ShardError, VerificationError
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.shards.directory import LocatedShards


def verify(
    shards: opt.SeveralShards,
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
    """Check shard directories, or some of their ranks: structure, placement, digests and values."""
    ep_ranks = opt.chosen_ranks(ep_rank, node_ranks) or None

    def look(path: str) -> tuple[dict[str, Any], LorashardError | None]:
        return _verify_one(
            path, against, ep_ranks, allow_pickle=allow_pickle, as_json=as_json, quiet=quiet
        )

    look_at_each(shards, look, key="shards", as_json=as_json)


def _verify_one(
    shards: str,
    against: str | None,
    ep_ranks: tuple[int, ...] | None,
    *,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> tuple[dict[str, Any], ShardError | None]:
    """Print what is found, unless as JSON. Returns the JSON, and the error if anything is wrong."""
    from lorashard.shards.directory import locate_shards, needed_files  # noqa: PLC0415
    from lorashard.verify.verify import proves_placement, verify_shards  # noqa: PLC0415
    from lorashard.writing.restore import proof_bytes  # noqa: PLC0415

    located = locate_shards(shards)
    manifest, placement = located.manifest, located.manifest.placement
    needed = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, shards)
    proves_all = proves_placement(manifest, ep_ranks)
    sizes = [file.digest.size_bytes for name, file in manifest.files.items() if name in needed]
    if against is not None:
        sizes += [digest.size_bytes for digest in manifest.source.files.values()]
    elif proves_all:
        sizes.append(proof_bytes(manifest))
    with bars.progress_bar(f"verify {located.place.name}", sum(sizes), quiet=quiet) as bar:
        findings = verify_shards(
            located,
            against=against,
            allow_pickle=allow_pickle,
            ep_ranks=ep_ranks,
            progress=bar.advance,
        )
    unproven_cast = against is None and proves_all and manifest.dtype is not None
    placement_proven = against is not None or (proves_all and not unproven_cast)
    failure = _failure(shards, located, ep_ranks, findings) if findings else None
    document = {
        "shards": shards,
        "ok": not findings,
        "against": against,
        "ep_ranks": None if ep_ranks is None else list(ep_ranks),
        "placement_proven": placement_proven and not findings,
        "findings": [with_flags(finding) for finding in findings],
        "rule": failure.rule.id if failure is not None and failure.rule is not None else None,
    }
    if as_json:
        return document, failure
    if findings:
        for finding in findings:
            render.print_line(with_flags(finding))
    elif not quiet:
        proven = "" if against is None else f", every value equal to {against}"
        if unproven_cast:
            proven = " (values were cast: only --against proves which expert each one is of)"
        noun = "rank" if ep_ranks is not None and len(ep_ranks) == 1 else "ranks"
        checked = "" if ep_ranks is None else f", {noun} {render.ids(ep_ranks)} checked"
        render.print_line(
            f"{shards}: ok, {placement.num_experts} experts on {placement.ep_size} ranks"
            f"{proven}{checked}"
        )
    return document, failure


def _failure(
    shards: str, located: LocatedShards, ep_ranks: Sequence[int] | None, findings: tuple[str, ...]
) -> ShardError:
    from lorashard.shards.held import find_held_ranks, find_partial  # noqa: PLC0415

    if ep_ranks is None and isinstance(located.place, Path):
        ep_size = located.manifest.placement.ep_size
        held = find_held_ranks(located.manifest, located.place)
        partial = find_partial(located.manifest, located.place)
        # One finding for each absent file, so nothing else is wrong.
        if partial is not None and len(findings) == ep_size - len(held):
            partial.hint = (
                f"After a `pull` of these ranks that is right, and {_options_for(held)} verifies it. "
                "Otherwise copy the whole directory again."
            )
            return partial
    return VerificationError(shards, findings)


def _options_for(held: tuple[int, ...]) -> str:
    first, last = held[0], held[-1]
    if held == tuple(range(first, last + 1)) and len(held) > 1:
        return f"--node-ranks {first}-{last}"
    return " ".join(f"--ep-rank {ep_rank}" for ep_rank in held)
