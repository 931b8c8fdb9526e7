"""Threads that start with torch in a forked process, as a vLLM worker is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import cache

import pytest

from lorashard.vllm_plugin.load.threads import reader_threads
from tests.tiny import REPO

# Exit codes of a child: 0 all is well, 7 the pool was missing, 8 anything else.
SCRIPT = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from lorashard.vllm_plugin.load.threads import reader_threads

FORKS, THREADS = 40, 8
values = torch.ones(40_000)  # large enough to be split over torch's threads

def multiply_at_once(make_threads):
    barrier = threading.Barrier(THREADS)
    def multiply(_):
        barrier.wait()
        values.mul(2)
    with make_threads(THREADS) as threads:
        list(threads.map(multiply, range(THREADS)))

def exit_code(make_threads):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 8
    try:
        multiply_at_once(make_threads)
        code = 0
    except RuntimeError as err:
        code = 7 if "Invalid thread pool!" in str(err) else 8
    finally:
        os._exit(code)

torch.set_num_threads(4)  # vLLM sets a number too; it makes the pool, which a fork loses
values.mul(2)
json.dump(
    {make.__name__: [exit_code(make) for _ in range(FORKS)]
     for make in (ThreadPoolExecutor, reader_threads)},
    sys.stdout,
)
"""


@cache
def exit_codes() -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


def test_reader_threads_find_torch_s_thread_pool_after_every_fork() -> None:
    assert set(exit_codes()["reader_threads"]) == {0}


def test_plain_threads_do_not_so_there_is_something_to_prevent() -> None:
    codes = exit_codes()["ThreadPoolExecutor"]
    if 7 not in codes:
        pytest.skip("this torch lets plain threads start at once after a fork")
    assert set(codes) <= {0, 7}


def test_no_more_threads_run_than_were_asked_for() -> None:
    with reader_threads(2) as threads:
        names = set(threads.map(_name_of_this_thread, range(50)))
    assert len(names) <= 2
    assert all(name.startswith("lorashard") for name in names)


def _name_of_this_thread(_: int) -> str:
    return threading.current_thread().name
