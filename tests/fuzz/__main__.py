"""`python -m tests.fuzz TARGET ... --seconds N --corpus DIR`: fuzz targets, one after the other.

DIR/TARGET keeps the corpus between runs. Exit code 1 if anything was found. --record FILE adds the
figures to a record, --minimise writes the smallest corpus of the targets to tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.corpus import KEPT, kept_inputs, unpack, write_inputs
from tests.fuzz.record import Figures, add_run, read_record, write_record
from tests.fuzz.targets import NAMES, find_target
from tests.vllm_release import release_sources

_REPO = Path(__file__).resolve().parents[2]
_SPARE_S = 600  # to start (vLLM is imported for `load`), and to be stopped for a while by others
_RELEASE = "0.33.0"


def environment_of(target: str) -> dict[str, str]:
    """Of a process that runs a target: no network, one thread, and vLLM where it is needed."""
    sources = release_sources(_RELEASE) if target == "load" else None
    paths = [str(_REPO), *([str(sources)] if sources else []), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
    }


def fuzz(target: str, folder: Path, seconds: int, hang_s: int) -> Figures:
    """One run. A process that dies (of memory, or time) leaves the input in `folder` and is a finding."""
    folder.mkdir(parents=True, exist_ok=True)
    unpack((*find_seeds(target), *kept_inputs(target)), folder / "corpus")
    (folder / "executions").unlink(missing_ok=True)
    arguments = [str(folder), target, f"-max_total_time={seconds}", f"-timeout={hang_s}"]
    began = time.monotonic()
    done = run_engine(target, arguments, folder, timeout_s=seconds + hang_s + _SPARE_S)
    executions, accepted = struct.unpack("<2Q", (folder / "executions").read_bytes())
    if done:
        print(f"{target}: the process ended with {done}, see {folder}/log", file=sys.stderr)
    found = len(list((folder / "findings").glob("*.input"))) + len(list(folder.glob("died-*")))
    corpus = len(os.listdir(folder / "corpus"))
    return Figures(executions, accepted, round(time.monotonic() - began), corpus, found)


def run_engine(target: str, arguments: list[str], folder: Path, timeout_s: float) -> int:
    """The exit code of `tests.fuzz.engine`; what it prints is in `folder/log`."""
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "tests.fuzz.engine", *arguments]
        try:
            return subprocess.run(
                command, env=environment_of(target), stdout=log, stderr=log, timeout=timeout_s,
                cwd=_REPO, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124


def find_seeds(target: str) -> tuple[bytes, ...]:
    """The seeds of a target, made in a process of its own where that needs vLLM."""
    if target != "load":
        return tuple(find_target(target).seeds())
    with tempfile.TemporaryDirectory() as folder:
        script = (
            "import sys, pathlib; from tests.fuzz.corpus import write_inputs;"
            "from tests.fuzz.targets import find_target;"
            f"write_inputs(pathlib.Path(sys.argv[1]), find_target({target!r}).seeds())"
        )
        path = Path(folder) / f"{target}.jsonl"
        command = [sys.executable, "-c", script, str(path)]
        subprocess.run(command, env=environment_of(target), cwd=_REPO, check=True)
        return kept_inputs(target, Path(folder))


def minimise(target: str, folder: Path) -> int:
    """Replace the corpus by a smallest set that reaches as much; how many inputs that are."""
    with tempfile.TemporaryDirectory() as temporary:
        smallest = Path(temporary) / "run"
        arguments = [str(smallest), target, "-merge=1", "-use_counters=0"]
        (smallest / "corpus").mkdir(parents=True)
        arguments.append(str(folder / "corpus"))
        run_engine(target, arguments, folder, timeout_s=600)
        inputs = [path.read_bytes() for path in (smallest / "corpus").iterdir()]
        if not inputs:
            raise SystemExit(f"{target}: nothing is left of the corpus, see {folder}/log")
        shutil.rmtree(folder / "corpus")
        unpack(inputs, folder / "corpus")
    return len(inputs)


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=[], help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--hang", type=int, default=20, help="seconds that no input may take (20)")
    parser.add_argument("--corpus", type=Path, default=None, help="kept between runs")
    parser.add_argument("--record", type=Path, default=None, help="a record to add to")
    parser.add_argument("--minimise", action="store_true", help="keep the corpus for pytest")
    asked = parser.parse_args()
    place = asked.corpus or Path(tempfile.mkdtemp())
    found = 0
    for target in asked.targets or NAMES:
        if target not in NAMES:
            parser.error(f"{target} is not one of {', '.join(NAMES)}")
        if asked.seconds:
            run = fuzz(target, place / target, asked.seconds, asked.hang)
            print(f"{target}: {run}", flush=True)
            found += run.findings
            if asked.record:
                write_record(add_run(read_record(asked.record), target, run), asked.record)
        if asked.minimise:
            left = minimise(target, place / target)
            inputs = [p.read_bytes() for p in (place / target / "corpus").iterdir()]
            KEPT.mkdir(exist_ok=True)
            write_inputs(KEPT / f"{target}.jsonl", (*inputs, *kept_inputs(target)))
            print(f"{target}: {left} inputs kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
