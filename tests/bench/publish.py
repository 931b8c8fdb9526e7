"""Publishing an adapter from a trainer's ranks, beside gathering it and beside `cp` of its bytes.

    python -m tests.bench.publish --scale 0.1 --ranks 2     seconds, for a first look
    python -m tests.bench.publish --ranks 4 8 --json FILE   45 MoE layers of GLM-4.5-Air: 6.2 GB
    python -m tests.bench.publish --ranks 2 8 --scale 0.16 --ep-size 2 --devices cuda:0 cuda:1 --only-ours
                                                            1.1 GB from GPUs

Everything is in /dev/shm. "first version" is written to new files, "later version" to those of a version
that was removed, as `Publisher` leaves them. `cp` copies the published files, each cut into as many
pieces as there are ranks, with one process a rank (`dd`), to new files. What each round of a commit took
is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lorashard.publish.removal import remove_shards
from tests.bench.machine import describe_machine
from tests.bench.trainer_ranks import Trainer

LAYERS = 45
OURS = ("first version", "later version")
OTHERS = ("gather and save_file", "cp")
MEGABYTE = 2**20


def copy_in_parallel(source: Path, target: Path, num_processes: int) -> float:
    """Seconds for `num_processes` processes to copy a directory's files, an equal share each."""
    target.mkdir()
    commands = []
    for number in range(num_processes):
        parts = []
        for file in source.iterdir():
            blocks = -(-file.stat().st_size // MEGABYTE)
            first, last = (blocks * n // num_processes for n in (number, number + 1))
            parts.append(
                f"dd if={file} of={target / file.name} bs=1M skip={first} seek={first} "
                f"count={last - first} conv=notrunc status=none"
            )
        commands.append(" && ".join(parts))
    began = time.perf_counter()
    processes = [subprocess.Popen(command, shell=True) for command in commands]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("dd failed")
    return time.perf_counter() - began


def measure(num_ranks: int, layers: int, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Median seconds of each way, and the ratios. Our first run, in which plans are made, is not counted."""
    ways = OURS if args.only_ours else (*OURS, *OTHERS)
    found: dict[str, list[float]] = {way: [] for way in ways}
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in OURS}
    num_bytes = 0
    with closing(Trainer(num_ranks, layers, tuple(args.devices))) as trainer:
        for run in range(args.repeat + 1):
            for way in OURS:
                shards = work / way.replace(" ", "-")
                seconds = trainer.run("write", shards, ep_size=args.ep_size)
                of_rounds = medians([trainer.rounds])
                print(f"{num_ranks} ranks, {way}: {seconds:.3f} s {of_rounds}", flush=True)
                num_bytes = sum(file.stat().st_size for file in shards.iterdir())
                if way == OURS[0]:
                    remove_shards(shards, as_spare=True)
                if run:
                    found[way].append(seconds)
                    rounds[way].append(trainer.rounds)
                    trainer.run("train")
            if run and not args.only_ours:
                for way, seconds in measure_others(trainer, shards, num_ranks, work):
                    print(f"{num_ranks} ranks, {way}: {seconds:.3f} s", flush=True)
                    found[way].append(seconds)
            shutil.rmtree(shards)
    median = {way: statistics.median(seconds) for way, seconds in found.items()}
    ratios = {} if args.only_ours else {
        "times faster than gather": {
            way: round(median["gather and save_file"] / median[way], 2) for way in OURS
        },
        "times cp": {way: round(median[way] / median["cp"], 2) for way in OURS},
    }  # fmt: skip
    return {
        "ranks": num_ranks,
        "gb": round(num_bytes / 1e9, 3),
        "seconds": {way: round(seconds, 3) for way, seconds in median.items()},
        **ratios,
        "rounds": {way: medians(of_runs) for way, of_runs in rounds.items()},
        "all": {way: [round(s, 3) for s in seconds] for way, seconds in found.items()},
    }


def measure_others(
    trainer: Trainer, shards: Path, num_ranks: int, work: Path
) -> Iterator[tuple[str, float]]:
    """Seconds of the usual way, and of a copy of the shards."""
    plain, copy = work / "plain", work / "copy"
    yield OTHERS[0], trainer.run("gather", plain)
    shutil.rmtree(plain)
    yield OTHERS[1], copy_in_parallel(shards, copy, num_ranks)
    shutil.rmtree(copy)


def medians(of_runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several runs' seconds, by what they went into."""
    return {name: round(statistics.median(run[name] for run in of_runs), 3) for name in of_runs[0]}


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.publish", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the layers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ep-size", type=int, default=8)
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="of the ranks, by turns")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    document: dict[str, Any] = {"machine": describe_machine(), "runs": []}
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
            run = measure(num_ranks, max(1, round(LAYERS * args.scale)), args, Path(work))
        document["runs"].append(run)
        print(json.dumps(run), flush=True)
        if args.json:
            args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    _main()
