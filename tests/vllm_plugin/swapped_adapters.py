"""Run inside a vLLM release: calls that fail on several workers, and two versions of a name in a step.

Real: the executor's `collective_rpc`, the workers' loop body, `Worker.add_lora`, both model runners'
`make_lora_inputs`, and each worker's LoRA manager (harness.py). Stand-ins: threads for the
workers' processes (worker_threads.py), and the rest of executor, worker and runner.
test_swapped_adapters_conformance.py says what is right.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorashard.vllm_plugin import register

register()

import numpy as np  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.executor.multiproc_executor import MultiprocExecutor  # noqa: E402
from vllm.v1.worker.gpu.lora_utils import LoraState  # noqa: E402
from vllm.v1.worker.gpu_input_batch import InputBatch  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402

from lorashard.vllm_plugin.patches.apply import original_of  # noqa: E402
from tests.vllm_plugin import harness, patched  # noqa: E402
from tests.vllm_plugin.engine_core import config_of  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import adapter_of  # noqa: E402
from tests.vllm_plugin.worker_threads import start_workers  # noqa: E402


def _worker(manager: Any) -> Any:
    """One whose `add_lora` is vLLM's."""
    runner = SimpleNamespace(lora_manager=manager, add_lora=manager.add_adapter)
    return SimpleNamespace(add_lora=partial(Worker.add_lora, SimpleNamespace(model_runner=runner)))


def _executor() -> tuple[Any, list[Any]]:
    """With the LoRA manager of each worker."""
    managers = [patched.engine_of(ep_rank=rank) for rank in range(2)]
    executor = MultiprocExecutor.__new__(MultiprocExecutor)
    executor.vllm_config = config_of(expert_parallel=True, asynchronous=False)
    start_workers(executor, [_worker(manager) for manager in managers])
    return executor, managers


def refused_on_all_ranks(*, stock: bool) -> list[Any]:
    """What the executor says of an adapter that is not there and of the next, and who has that then."""
    add_lora = original_of(Executor.add_lora) if stock else Executor.add_lora
    assert add_lora is not None
    executor, managers = _executor()
    folder = Path(tempfile.mkdtemp())
    good = adapter_of("L1", 0).write(folder / "good")
    said = []
    for number, path in enumerate((folder / "absent", good), start=1):
        request = harness.request(None, path, f"a{number}", number)
        try:
            said.append(add_lora(executor, request))
        except RuntimeError as err:
            said.append(str(err))
    return [*said, [sorted(manager.list_adapters()) for manager in managers]]


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
