"""Programs of this folder on one host, in stages: those of a stage side by side, the stages in turn.

    python -m tests.gpu.stages PLAN --sites DIR --work DIR --out DIR [--limit SECONDS] [--packed FILE.tgz]

PLAN is a text. An empty line begins the next stage, # a comment, and any other line is a program:

    NAME SECONDS RELEASE [VARIABLE=VALUE...] MODULE ARGUMENTS...
    cost 180     0.33.0  tests.gpu.eplb_cost

It runs as `python -m MODULE --work WORK --out OUT/NAME.json ARGUMENTS...` with SITES/RELEASE and
SITES/common on its path, for SECONDS at most, and prints to OUT/NAME.log. What is left of it then, an
engine in a session of its own included, is ended before the next stage, whose figures it would spoil. A
program that the limit leaves no time for is not started. FILE.tgz has the documents and logs in OUT and
WORK/logs, and is written again and again meanwhile: a host that is taken away leaves the last one.
"""

import argparse
import contextlib
import io
import os
import shlex
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tests.gpu.processes import child_environment, run

MARK = "LORASHARD_GPU_STAGES"  # in the environment of all that a program starts
_SPARE_S = 10.0  # to end engines and write files
_PACK_EVERY_S = 20.0
_MOST_BYTES = 4 << 20  # of a file that is packed
_PACKED = {".json", ".jsonl", ".log"}


@dataclass(frozen=True, slots=True)
class Program:
    """One line of a plan."""

    name: str
    limit_s: float
    release: str
    arguments: tuple[str, ...]  # the module, and its own
    variables: tuple[tuple[str, str], ...] = ()  # of its environment

    def command(self, work: Path, out: Path) -> list[str]:
        """Arguments of Python."""
        module, *more = self.arguments
        places = ("--work", str(work), "--out", str(out / f"{self.name}.json"))
        return ["-m", module, *places, *more]


def read_plan(text: str) -> list[list[Program]]:
    """The stages. Raises ValueError for a line that is no program, or a name that comes twice."""
    stages: list[list[Program]] = [[]]
    names: set[str] = set()
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            if stages[-1] and not line.strip():
                stages.append([])
            continue
        if len(words) < 4:
            raise ValueError(f"not NAME SECONDS RELEASE MODULE ...: {line}")
        name, seconds, release, *arguments = words
        variables = [word.split("=", 1) for word in takewhile(lambda word: "=" in word, arguments)]
        arguments = arguments[len(variables) :]
        if name in names or not arguments:
            raise ValueError(f"a name that comes twice, or no module: {line}")
        names.add(name)
        named = tuple((variable, value) for variable, value in variables)
        stages[-1].append(Program(name, float(seconds), release, tuple(arguments), named))
    return [stage for stage in stages if stage]


def run_stage(
    stage: Sequence[Program], sites: Path, work: Path, out: Path, ends: float
) -> dict[str, str]:
    """How each program ended. ends: the time, on the monotonic clock, at which all are ended."""

    def run_program(program: Program) -> str:
        path = os.pathsep.join(str(sites / name) for name in (program.release, "common"))
        environment = child_environment(False, {**dict(program.variables), MARK: program.name})
        environment["PYTHONPATH"] += os.pathsep + path
        began = time.monotonic()
        limit_s = min(program.limit_s, ends - began)
        ended = run(program.command(work, out), out / f"{program.name}.log", environment, limit_s)
        return ended or f"exit status 0 after {time.monotonic() - began:.0f} s"

    with ThreadPoolExecutor(len(stage)) as pool:
        said = dict(zip((program.name for program in stage), pool.map(run_program, stage)))
    end_marked()
    return said


def end_marked() -> None:
    """End all that a program has started and left."""
    import psutil

    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and MARK in process.environ():
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=_SPARE_S)  # a GPU's memory is free once they are gone


def run_stages(
    stages: Sequence[Sequence[Program]], sites: Path, work: Path, out: Path, limit_s: float
) -> dict[str, str]:
    """How each program ended; printed as well, once it is known."""
    ends = time.monotonic() + limit_s - _SPARE_S
    said: dict[str, str] = {}
    for stage in stages:
        if time.monotonic() < ends:
            new = run_stage(stage, sites, work, out, ends)
        else:
            new = {program.name: "not started: no time is left" for program in stage}
        for name, how in new.items():
            print(f"{name}: {how}", flush=True)
        said |= new
    return said


def pack(file: Path, *folders: Path) -> None:
    """Write the documents and logs in these folders, caches left out, into a .tgz that is whole at any time."""
    new = file.with_name(f"{file.name}.new")
    with tarfile.open(new, "w:gz", compresslevel=3) as archive:
        for path in sorted(path for folder in folders for path in folder.rglob("*")):
            is_wanted = path.suffix in _PACKED and "cache" not in path.parts
            with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
                if is_wanted and path.is_file() and path.stat().st_size <= _MOST_BYTES:
                    _add(archive, path)
    new.replace(file)


def _add(archive: tarfile.TarFile, path: Path) -> None:
    """A file as it is now: a log may grow while it is read."""
    content = path.read_bytes()
    entry = tarfile.TarInfo(str(path).lstrip("/"))
    entry.size, entry.mtime = len(content), path.stat().st_mtime
    archive.addfile(entry, io.BytesIO(content))


@contextlib.contextmanager
def packing(file: Path | None, *folders: Path, every_s: float = _PACK_EVERY_S) -> Iterator[None]:
    """Have `file` be as the folders were some seconds ago at most, and as they are in the end."""
    if file is None:
        yield
        return
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(every_s):
            pack(file, *folders)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        pack(file, *folders)


def main() -> int:
    """Run what the command line says; 1 unless all programs ended well."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--sites", type=Path, required=True, help="a folder of packages by release")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=590, help="seconds for all of it (590)")
    parser.add_argument("--packed", type=Path, help="a .tgz for what comes out")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    stages = read_plan(asked.plan.read_text())
    with packing(asked.packed, asked.out, asked.work / "logs"):
        said = run_stages(stages, asked.sites, asked.work, asked.out, asked.limit)
    return 0 if all(how.startswith("exit status 0") for how in said.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
