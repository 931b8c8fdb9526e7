"""Split every adapter in every form, with lorashard's command line."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.cases import PLAIN, SPLITS
from tests.gpu.kinds_cases import ALL
from tests.gpu.models import FINISHED
from tests.gpu.processes import ROOT, one_at_a_time
from tests.gpu.tiny_model import TinyModel


def _wanted(model: str) -> set[tuple[str, str]]:
    """Pairs (adapter, form) that some case asks for."""
    return {
        (check.adapter, check.form)
        for case in ALL
        if case.model == model
        for check in case.checks
        if check.form != PLAIN
    }


def lorashard(*arguments: str) -> None:
    """Run the command; its own message is enough if it fails."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    command = [sys.executable, "-m", "lorashard", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lorashard {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def _split(directory: Path, adapter: str, form: str, verify: bool) -> None:
    out = directory / f"{adapter}.{form}"
    if not (out / "lorashard.json").exists():
        model = ("--model", str(directory / "model"))
        lorashard("split", str(directory / adapter), *SPLITS[form], *model, "-o", str(out), "-q")
    if verify:
        lorashard("verify", str(out), "--against", str(directory / adapter), "-q")


def split_all(
    models: Path, names: Iterable[str] | Mapping[str, TinyModel], verify: bool = False
) -> int:
    """Write what is missing; returns how many shard directories there are now."""
    jobs = [
        (models / name, *pair, verify)
        for name in names
        if (models / name / FINISHED).exists()
        for pair in sorted(_wanted(name))
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: _split(*job), jobs))
    return len(jobs)


def split_each(directory: Path, wanted: Iterable[tuple[str, str]]) -> None:
    """The same for some pairs (adapter, form) of one model."""
    with one_at_a_time(directory), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: _split(directory, *pair, verify=False), sorted(wanted)))


if __name__ == "__main__":
    from tests.gpu.models import MODELS

    print(split_all(Path(sys.argv[1]), MODELS, verify=True), "shard directories, verified")
