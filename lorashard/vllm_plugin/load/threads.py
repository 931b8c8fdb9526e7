"""The threads that read adapters: a number -> an executor whose threads can use torch at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

_ONE_AT_A_TIME = threading.Lock()


def reader_threads(count: int) -> ThreadPoolExecutor:
    """At most `count` threads, started on demand, in each of which torch is set up."""
    return ThreadPoolExecutor(count, "lorashard", initializer=_settle_torch)


def _settle_torch() -> None:
    """Set torch up in this thread while no other thread does so.

    A thread's first parallel operation asks for torch's thread pool. In a forked process, such as
    a vLLM worker, the first to ask replaces the pool, and a thread that asks at that moment finds
    none: "Invalid thread pool!" (ATen/ParallelOpenMP.cpp:64,
    caffe2/utils/threadpool/pthreadpool-cpp.cc; seen with vLLM 0.26.0 on torch 2.11).
    """
    import torch

    with _ONE_AT_A_TIME:
        torch.get_num_threads()
