"""The threads that read adapters."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

_ONE_AT_A_TIME = threading.Lock()


def reader_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads that can use torch at once, started on demand."""
    return ThreadPoolExecutor(count, "lorashard", initializer=_settle_torch)


def _settle_torch() -> None:
    """Let torch set this thread up while no other does.

    A thread's first parallel operation asks for torch's thread pool. In a forked process, such as
    a vLLM worker, the first to ask replaces the pool, and one that asks meanwhile finds none:
    "Invalid thread pool!" (ATen/ParallelOpenMP.cpp:64, caffe2/utils/threadpool/pthreadpool-cpp.cc;
    met with vLLM 0.26.0 on torch 2.11).
    """
    import torch

    with _ONE_AT_A_TIME:
        torch.get_num_threads()
