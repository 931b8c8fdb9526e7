"""Which ranks' files a local shard directory holds: all, or those that `pull` fetched."""

from __future__ import annotations

from pathlib import Path

from lorashard.errors import PartialShardsError
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import REPLICATED_NAME, rank_file_name


def find_held_ranks(manifest: Manifest, directory: Path) -> tuple[int, ...]:
    """The ep ranks whose file is in a local directory, as `pull` leaves it."""
    ep_size = manifest.placement.ep_size
    names = (rank_file_name(ep_rank, ep_size) for ep_rank in range(ep_size))
    return tuple(ep_rank for ep_rank, name in enumerate(names) if (directory / name).exists())


def find_partial(manifest: Manifest, directory: Path) -> PartialShardsError | None:
    """The error for a directory with the files of some ranks only; None if that is not what it is."""
    held, ep_size = find_held_ranks(manifest, directory), manifest.placement.ep_size
    num_absent = ep_size - len(held)
    if not held or not num_absent or not (directory / REPLICATED_NAME).exists():
        return None
    needing = f"ranks {_in_short(held)} need" if len(held) > 1 else f"rank {held[0]} needs"
    first = next(ep_rank for ep_rank in range(ep_size) if ep_rank not in held)
    absent = rank_file_name(first, ep_size) + (", ..." if num_absent > 1 else "")
    verb = "is" if num_absent == 1 else "are"
    return PartialShardsError(
        f"{directory}: {num_absent} of {ep_size} rank files {verb} not here ({absent}), only what "
        f"{needing}.",
        hint="That is enough to serve these ranks. For anything else, `lorashard pull` the other ranks "
        "into it too, or use the whole directory.",
    )


def _in_short(ep_ranks: tuple[int, ...]) -> str:
    first, last = ep_ranks[0], ep_ranks[-1]
    if ep_ranks == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, ep_ranks))
