"""Inside a vLLM release: the workers of a MultiprocExecutor, as threads of this process.

Their loop, and what the executor sends and reads, are vLLM's. Stand-ins: queues in this process, as short
as vLLM's, for those in shared memory.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from vllm.v1.executor.multiproc_executor import WorkerProc

PLACES = 10  # of a queue between two processes: the default of vLLM's MessageQueue
WAIT_S = 60  # only a hang takes as long


class Queue:
    """Stand-in for vLLM's MessageQueue, or for one to several. `enqueue` waits for a place."""

    def __init__(self, *queues: Queue) -> None:
        self.items: queue.Queue[Any] = queue.Queue(PLACES)
        self._queues = queues or (self,)

    def enqueue(self, item: Any) -> None:
        for one in self._queues:
            one.items.put(item, timeout=WAIT_S)

    def dequeue(self, *, timeout: float | None = None, **_: Any) -> Any:
        return self.items.get(timeout=timeout)


def start_workers(executor: Any, workers: Sequence[Any]) -> None:
    """Give a MultiprocExecutor these workers, each in a loop of its own. calls: what they are sent."""
    executor.calls = [Queue() for _ in workers]
    executor.rpc_broadcast_mq = Queue(*executor.calls)
    executor.response_mqs = [Queue() for _ in workers]
    executor.futures_queue, executor.is_failed = deque(), False
    executor.shutdown_event = threading.Event()
    executor._finalizer = lambda: None  # there is nothing to shut down
    for rank, worker in enumerate(workers):
        process = WorkerProc.__new__(WorkerProc)
        process.worker, process.rank, process.use_async_scheduling = worker, rank, False
        process.rpc_broadcast_mq = executor.calls[rank]
        process.worker_response_mq = executor.response_mqs[rank]
        threading.Thread(target=process.worker_busy_loop, daemon=True).start()
