"""One target under atheris, in a process of its own: `python -m tests.fuzz.engine FOLDER TARGET ...`.

FOLDER gets `corpus/` (a file for each input), `findings/` (an input and a text for each), and
`executions`, a number of eight bytes that is right even if the process dies.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.targets import find_target

with atheris.instrument_imports(include=["lorashard"]):
    from tests.fuzz.outcome import Finding, outcome_of
    from tests.fuzz.target import Target


class Executions:
    """Counts executions and acceptances in a file."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")

    def add(self, *, accepted: bool) -> None:
        self._numbers[0] += 1
        self._numbers[1] += accepted


def keep(finding: Finding, data: bytes, folder: Path) -> None:
    """The shortest input of each finding, and its text."""
    folder.mkdir(exist_ok=True)
    stem = folder / hashlib.sha1(finding.key.encode()).hexdigest()[:12]
    path = stem.with_suffix(".input")
    if path.exists() and path.stat().st_size <= len(data):
        return
    path.write_bytes(data)
    stem.with_suffix(".txt").write_text(f"{finding.key}\n\n{finding.text}")
    print(f"finding: {finding.key}", file=sys.stderr)


def fuzz(target: Target, folder: Path, arguments: list[str]) -> None:
    """Run until libFuzzer's arguments say that it is enough; never returns."""
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    executions = Executions(folder / "executions")

    def run_one(data: bytes) -> None:
        outcome = outcome_of(target, data)
        executions.add(accepted=outcome.accepted)
        if outcome.finding is not None:
            keep(outcome.finding, data, folder / "findings")

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        made = target.mutate(data, max_bytes, Random(seed))
        own: bytes = atheris.Mutate(data, max_bytes) if made is None else made
        return own

    options = [
        f"-max_len={target.max_bytes}", "-len_control=0", "-rss_limit_mb=2500",
        f"-artifact_prefix={folder}/died-", "-print_final_stats=1", "-report_slow_units=1000", str(folder / "corpus"), *arguments,
    ]  # fmt: skip
    # As libFuzzer, which merges corpora in a process of its own, has to start this one.
    itself = f"{sys.executable} -m tests.fuzz.engine {folder} {target.name}"
    atheris.Setup([itself, *options], run_one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    place, name, *rest = sys.argv[1:]
    with atheris.instrument_imports(include=["lorashard"]):
        chosen = find_target(name)
    fuzz(chosen, Path(place), rest)
