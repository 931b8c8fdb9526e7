"""Child processes: their environment, their time limit, and their end."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]


def child_environment(stock: bool, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a vLLM process of ours gets; `stock` makes the plugin inert."""
    environment = dict(os.environ)
    environment.update(
        VLLM_USE_FLASHINFER_SAMPLER="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        PYTHONUNBUFFERED="1",
        # No NVLink multicast, in NCCL, PyTorch and NVSHMEM: a program that uses it can take GPUs
        # out of service that other machines share. vLLM's symmetric-memory all-reduce wants it.
        NCCL_NVLS_ENABLE="0",
        TORCH_SYMM_MEM_DISABLE_MULTICAST="1",
        NVSHMEM_DISABLE_NVLS="1",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
        # The checkout by its path, because vLLM's workers start with other sys.path entries.
        PYTHONPATH=os.pathsep.join([str(ROOT), *_split(environment.get("PYTHONPATH", ""))]),
    )
    # vLLM picks free ports by itself; a fixed VLLM_PORT would make engines fight over one.
    environment.pop("VLLM_PORT", None)
    environment.pop("LORASHARD_DISABLE", None)
    if stock:
        environment["LORASHARD_DISABLE"] = "1"
    return environment | dict(changes or {})


def _split(path: str) -> list[str]:
    return [entry for entry in path.split(os.pathsep) if entry and entry != str(ROOT)]


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], cpus: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """A process group of its own, writing to `log`. cpus: that it may use; all if none are given."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            cwd=ROOT,
            start_new_session=True,
        )
    if cpus:  # long before it starts threads and processes, which get the same
        os.sched_setaffinity(process.pid, cpus)
    return process


def cpus_apart(count: int) -> list[list[int]]:
    """CPUs for so many processes that are not to disturb each other. This one keeps what is left."""
    cpus = sorted(os.sched_getaffinity(0))
    each = (len(cpus) - 1) // count
    if each == 0:
        return [[] for _ in range(count)]
    os.sched_setaffinity(0, cpus[count * each :])
    return [cpus[number * each : (number + 1) * each] for number in range(count)]


def end(process: subprocess.Popen[bytes]) -> None:
    """End what `start` started, workers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    cpus: Collection[int] = (),
) -> str:
    """Run to the end or to the limit; returns "" or why it did not end well. cpus: see `start`."""
    started = time.monotonic()
    process = start(command, log, environment, cpus)
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return f"no end after {time.monotonic() - started:.0f} s"
    finally:
        end(process)
    return "" if status == 0 else f"exit status {status}"


def last_error(text: str) -> str:
    """The first exception of a log: later ones are mostly its echo in other processes."""
    found = re.findall(r"^.*?\b(\w*(?:Error|Exception)\b: .*)$", text, re.MULTILINE)
    return str(found[0])[:400] if found else ""


def gpu_name() -> str:
    """Of the first GPU, as records have it."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "GPUs"


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Programs that prepare the same folder wait for each other, and do not fight over the CPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def exit_after(program: Callable[[], object]) -> NoReturn:
    """Run what starts an engine in this process, and exit: with 1 if it fails, as the log then shows.

    The engine's workers end with it in any case.
    """
    status = 1
    try:
        program()
        status = 0
    except BaseException:  # noqa: BLE001 - see above
        traceback.print_exc()
    _end_children()
    os._exit(status)


def _end_children() -> None:
    """End all descendants of this process: vLLM's workers can outlive it."""
    import psutil

    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
