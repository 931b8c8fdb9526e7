"""Contestants in one process, in alternating rounds; what each takes beside ours."""

import gc
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The second is an object store as a machine in its region sees it.
NETWORKS: Mapping[str, Mapping[str, float]] = {
    "loopback": {},
    "30 ms, 80 MB/s a connection": {"delay_s": 0.03, "connection_bytes_per_s": 80e6},
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """run: moves the bytes. prepare: before each round, untimed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def measure(title: str, contestants: Sequence[Contestant], num_rounds: int) -> None:
    """Print the medians; the first contestant is ours. A round that nobody counts comes first."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    processor: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(num_rounds + 1):
        for contestant in contestants if number % 2 else contestants[::-1]:
            contestant.prepare()
            gc.collect()
            started, cpu = time.perf_counter(), time.process_time()
            contestant.run()
            if number:
                times[contestant.name].append(time.perf_counter() - started)
                processor[contestant.name].append(time.process_time() - cpu)
    ours = times[contestants[0].name]
    print(f"\n{title}, {num_rounds} rounds\n\n| | s | of ours | CPU s |\n|---|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, ours, strict=True))
        cpu_s = statistics.median(processor[name])
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.2f} | {cpu_s:.2f} |")
    sys.stdout.flush()


def prove(directory: Path, names: Iterable[str]) -> None:
    """What `pull` does beside fetching: a digest of each file, which then is on the disk."""
    from blake3 import blake3

    for name in names:
        blake3(max_threads=blake3.AUTO).update_mmap(directory / name).hexdigest()
        fd = os.open(directory / name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
