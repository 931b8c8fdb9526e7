"""Run inside a vLLM release: calls that fail on several workers, and two versions of a name in a step.

Real: the executor's `collective_rpc`, the workers' loop body, `Worker.add_lora`, both model runners'
`make_lora_inputs`, and each worker's LoRA manager (harness.py). Stand-ins: queues in this process for
vLLM's in shared memory, and the rest of executor, worker and runner. test_swapped_adapters_conformance.py
says what is right.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorashard.vllm_plugin import register

register()

import numpy as np  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc  # noqa: E402
from vllm.v1.worker.gpu.lora_utils import LoraState  # noqa: E402
from vllm.v1.worker.gpu_input_batch import InputBatch  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402

from lorashard.vllm_plugin.patches.apply import original_of  # noqa: E402
from tests.vllm_plugin import harness, patched  # noqa: E402
from tests.vllm_plugin.engine_core import config_of  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import adapter_of  # noqa: E402


class _Queue:
    """Stand-in for vLLM's MessageQueue, from one process to another."""

    def __init__(self) -> None:
        self._items: queue.Queue[Any] = queue.Queue()

    def enqueue(self, item: Any) -> None:
        self._items.put(item)

    def dequeue(self, *, timeout: float | None = None, **_: Any) -> Any:
        return self._items.get(timeout=20 if timeout is None else timeout)


class _ToAll:
    """The same to several."""

    def __init__(self, queues: list[_Queue]) -> None:
        self._queues = queues

    def enqueue(self, item: Any) -> None:
        for one in self._queues:
            one.enqueue(item)


class _Loop:
    """One worker process, as a thread: what it does with a call is vLLM's."""

    def __init__(self, rank: int) -> None:
        self.calls, self.answers = _Queue(), _Queue()
        self.manager = patched.engine_of(ep_rank=rank)
        worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=self.manager))
        worker.model_runner.add_lora = self.manager.add_adapter
        process = WorkerProc.__new__(WorkerProc)
        process.worker = SimpleNamespace(add_lora=partial(Worker.add_lora, worker))
        process.rank, process.use_async_scheduling = rank, False
        process.rpc_broadcast_mq, process.worker_response_mq = self.calls, self.answers
        threading.Thread(target=process.worker_busy_loop, daemon=True).start()


def _executor() -> tuple[Any, list[_Loop]]:
    loops = [_Loop(rank) for rank in range(2)]
    executor = MultiprocExecutor.__new__(MultiprocExecutor)
    executor.rpc_broadcast_mq = _ToAll([loop.calls for loop in loops])
    executor.response_mqs = [loop.answers for loop in loops]
    executor.futures_queue, executor.is_failed = deque(), False
    executor.shutdown_event = threading.Event()
    executor.vllm_config = config_of(expert_parallel=True, asynchronous=False)
    executor._finalizer = lambda: None  # there is nothing to shut down
    return executor, loops


def refused_on_all_ranks(*, stock: bool) -> list[Any]:
    """What the executor says of an adapter that is not there and of the next, and who has that then."""
    add_lora = original_of(Executor.add_lora) if stock else Executor.add_lora
    assert add_lora is not None
    executor, loops = _executor()
    folder = Path(tempfile.mkdtemp())
    good = adapter_of("L1", 0).write(folder / "good")
    said = []
    for number, path in enumerate((folder / "absent", good), start=1):
        request = harness.request(None, path, f"a{number}", number)
        try:
            said.append(add_lora(executor, request))
        except RuntimeError as err:
            said.append(str(err))
    return [*said, [sorted(loop.manager.list_adapters()) for loop in loops]]


def _of_v1(requests: list[LoRARequest]) -> Any:
    numbers = np.array([request.lora_int_id for request in requests])
    batch = SimpleNamespace(
        request_lora_mapping=numbers, num_reqs=len(requests),
        lora_id_to_lora_request={request.lora_int_id: request for request in requests},
    )  # fmt: skip
    ones = np.ones(len(requests), dtype=np.int32)
    return InputBatch.make_lora_inputs(batch, ones, ones)[2]


def _of_v2(requests: list[LoRARequest]) -> Any:
    state = LoraState(max_num_reqs=4)
    names = [f"r{number}" for number in range(len(requests))]
    for index, (name, request) in enumerate(zip(names, requests, strict=True)):
        state.add_request(name, index, request)
    ones = np.ones(len(requests), dtype=np.int32)
    return state.make_lora_inputs(names, np.arange(len(requests)), ones)[2]


def two_versions_in_a_step() -> dict[str, list[int]]:
    """The adapters that are active in a step for two of one name, by the model runner that asks."""
    folder = Path(tempfile.mkdtemp())
    paths = [adapter_of("L1", seed).write(folder / f"v{seed}") for seed in range(3)]
    old, new, other = (
        harness.request(None, path, name, number)
        for number, (name, path) in enumerate(zip(("s", "s", "t"), paths, strict=True), start=1)
    )
    active = {}
    for runner, inputs_of in (("V1", _of_v1), ("V2", _of_v2)):
        for order in ([old, new], [new, old]):
            engine = patched.engine_of(max_loras=2, max_cpu_loras=3)
            for request in (*order, other):  # takes the slot of the first
                engine.add_adapter(request)
            engine.set_active_adapters(inputs_of(order), None)
            numbers = engine._adapter_manager.lora_index_to_id
            active[f"{runner}, {order[0].lora_int_id} first"] = sorted(numbers)
    return active


def is_equal_by_name_alone() -> bool:
    """Whether vLLM's own comparison takes two versions of a name for the same."""
    compare = original_of(vars(LoRARequest)["__eq__"])
    assert compare is not None
    old, new = (harness.request(None, f"/{number}", "s", number) for number in (1, 2))
    return bool(compare(old, new)) and old != new and len({old, new}) == 2


def run_all() -> dict[str, Any]:
    return {
        "refused": refused_on_all_ranks(stock=False),
        "refused, stock": refused_on_all_ranks(stock=True),
        "two versions": two_versions_in_a_step(),
        "by name alone": is_equal_by_name_alone(),
    }
