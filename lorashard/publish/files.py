"""The files that ranks write together: new ones, or the spare ones of a version that is outdated.

In: the directory that all ranks write, and a plan. Out: where each file is until all ranks are done;
then every file has its name in the directory, and nothing spare is left.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from lorashard.shards.plan import ShardPlan
from lorashard.storage.locked_directory import remove_directory
from lorashard.storage.spares import take_spare

_SPARE = ".spare"


def fetch_spare_files(directory: Path, target: Path) -> None:
    """What rank 0 does before the others look: the spare files beside the target are to be written."""
    take_spare(target.parent, directory / _SPARE)


def choose_files(directory: Path, plan: ShardPlan, gaps: Collection[int]) -> tuple[Path, ...]:
    """Where the ranks write each file of the plan. The same on each rank.

    gaps: of the files in which nobody writes some of the bytes. They must be zero, so these are new.
    """
    spare = [directory / _SPARE / file.name for file in plan.files]
    return tuple(
        path if number not in gaps and path.exists() else directory / path.name
        for number, path in enumerate(spare)
    )


def name_files(directory: Path, files: Sequence[Path]) -> None:
    """What rank 0 does when all are written. files: as they were chosen."""
    for path in files:
        if path.parent != directory:
            os.rename(path, directory / path.name)
    remove_directory(directory / _SPARE)
