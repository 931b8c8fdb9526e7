"""Run inside a vLLM release: an engine's loop, and adapters that its workers add or remove between steps.

Real: the loop of EngineCoreProc, its scheduler, MultiprocExecutor's `collective_rpc`, the workers' loop,
and each worker's LoRA manager. Stand-ins: threads for processes (worker_threads.py), and queues in this
process for sockets. test_answered_later_conformance.py says what is right.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.vllm_plugin import engine_core as ec
from tests.vllm_plugin import patched, unloading
from tests.vllm_plugin.worker_threads import PLACES, WAIT_S, start_workers

from vllm.v1.engine import EngineCoreRequestType, core as vllm_core  # isort: skip
from vllm.v1.executor.multiproc_executor import MultiprocExecutor  # isort: skip

from lorashard.vllm_plugin.patches.apply import original_of

MANY = 3 * PLACES


class Worker(ec.Worker):
    """It waits with an adapter's load or removal until `may_go_on` is set."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)
        self.may_go_on, self.is_at_it = threading.Event(), threading.Event()
        self.may_go_on.set()
        self._answers: deque[Any] = deque()

    def add_lora(self, lora_request: Any) -> bool:
        self._wait()
        return super().add_lora(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        self._wait()
        return super().remove_lora(lora_id)

    def _wait(self) -> None:
        self.is_at_it.set()
        assert self.may_go_on.wait(WAIT_S)

    def execute_model(self, scheduled: Any) -> Any:
        answer = super().execute_model(scheduled)
        if not answer.req_ids:
            return answer
        self._answers.append(answer)
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._answers.popleft()


class InThreads(MultiprocExecutor):  # type: ignore[misc]
    """Two workers."""

    def _init_executor(self) -> None:
        self.workers = [Worker(rank) for rank in range(2)]
        self.output_rank = 0
        self.kv_output_aggregator = self.ec_output_aggregator = None
        start_workers(self, self.workers)

    compile_or_warm_up_model = ec.InProcess.compile_or_warm_up_model
    initialize_from_config = ec.InProcess.initialize_from_config
    max_concurrent_batches = ec.InProcess.max_concurrent_batches
    check_health = ec.InProcess.check_health


class Core(vllm_core.EngineCoreProc):  # type: ignore[misc]
    """Without its sockets."""

    def __init__(self, vllm_config: Any) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.engine_index, self.engines_running = 0, False
        self.has_coordinator = self.publish_dp_lb_stats = self.enable_fault_tolerance = False
        self.process_input_queue_block, self.reject_new_requests = True, False
        if hasattr(vllm_core, "EngineShutdownState"):
            self.shutdown_state = vllm_core.EngineShutdownState.RUNNING
        vllm_core.EngineCore.__init__(self, vllm_config, InThreads, log_stats=False)


class Engine:
    """Its loop in a thread, and a client's side of it."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.core = Core(ec.config_of(expert_parallel=True, asynchronous=asynchronous))
        self.executor: Any = self.core.model_executor
        self._calls = 0
        self.tokens = 0
        self._answers: dict[int, Any] = {}
        threading.Thread(target=self.core.run_busy_loop, daemon=True).start()

    def call(self, method: str, *arguments: Any) -> int:
        self._calls += 1
        request = (0, self._calls, method, arguments)
        self.core.input_queue.put((EngineCoreRequestType.UTILITY, request))
        return self._calls

    def send(self, name: str, lora_request: Any, max_tokens: int) -> None:
        """A request of the client's."""
        front = SimpleNamespace(
            preprocess_add_request=self.core.preprocess_add_request,
            add_request=lambda *request: self.core.input_queue.put(
                (EngineCoreRequestType.ADD, request)
            ),
        )
        ec.send(front, name, lora_request, max_tokens)

    def answer(self, call: int) -> Any:
        """What the client gets: the result, or why there is none."""
        while call not in self._answers:
            _, outputs = self.core.output_queue.get(timeout=WAIT_S)
            self.tokens += sum(len(output.new_token_ids) for output in outputs.outputs)
            if (output := outputs.utility_output) is not None:
                failed = output.failure_message is not None
                self._answers[output.call_id] = (
                    output.failure_message if failed else output.result.result
                )
        return self._answers[call]

    def hold(self) -> None:
        for worker in self.executor.workers:
            worker.is_at_it.clear()
            worker.may_go_on.clear()

    def release(self) -> None:
        for worker in self.executor.workers:
            worker.may_go_on.set()

    def scheduled_behind(self) -> str:
        """What the workers are given while they are held at a call."""
        for worker in self.executor.workers:
            assert worker.is_at_it.wait(WAIT_S)
        if not hasattr(self.core, "_idle_state_callbacks"):
            return "nothing, in this release"
        ends = time.monotonic() + WAIT_S
        while self.executor.calls[0].items.empty() and time.monotonic() < ends:
            time.sleep(0.001)
        return next((str(item[0]) for item in list(self.executor.calls[0].items.queue)), "nothing")

    def held(self) -> list[list[int]]:
        return ec.loaded(self.core)


def adapter(seed: int, number: int) -> Any:
    return unloading.request(unloading.adapter_at(patched.folder() / f"a{number}", seed), number)


def while_steps_go_on(*, asynchronous: bool) -> Any:
    """Steps that wait behind an adapter that the workers add, and what the client gets."""
    engine = Engine(asynchronous=asynchronous)
    engine.send("long", None, 200)
    engine.hold()
    call = engine.call("add_lora", adapter(0, 1))
    behind = engine.scheduled_behind()
    engine.release()
    added = engine.answer(call)
    engine.send("with it", adapter(0, 1), 3)
    return [behind, added, engine.held(), sorted(engine.answer(engine.call("list_loras")))]


def removed_while_steps_go_on() -> Any:
    """The same for an adapter that goes."""
    engine = Engine(asynchronous=True)
    engine.answer(engine.call("add_lora", adapter(0, 1)))
    engine.send("long", None, 200)
    engine.hold()
    call = engine.call("remove_lora", 1)
    behind = engine.scheduled_behind()
    engine.release()
    return [
        behind,
        engine.answer(call),
        engine.held(),
        engine.answer(engine.call("remove_lora", 1)),
    ]


def removed_with_its_last_request() -> Any:
    """It is unloaded while a request uses it; nobody asks for an answer then."""
    engine = Engine(asynchronous=True)
    mine = adapter(0, 1)
    engine.answer(engine.call("add_lora", mine))
    engine.send("long", None, 200)
    engine.hold()
    engine.send("uses it", mine, 3)
    engine.release()
    said = engine.answer(engine.call("remove_lora", 1))
    ends = time.monotonic() + WAIT_S
    while engine.answer(engine.call("list_loras")) and time.monotonic() < ends:
        time.sleep(0.001)
    return [said, engine.held()]


def while_idle() -> Any:
    """No step follows that would bring the answer along."""
    engine = Engine(asynchronous=True)
    said = [engine.answer(engine.call("add_lora", adapter(n, n))) for n in (1, 2)]
    return [said, engine.held()]


def at_the_end_of_the_last_request() -> Any:
    """Again and again, so that some calls come as the engine becomes idle."""
    engine = Engine(asynchronous=True)
    wanted = [adapter(n, n) for n in (1, 2)]
    said = []
    for number in range(60):
        engine.send(f"r{number}", None, 1 + number % 7)
        said.append(engine.answer(engine.call("add_lora", wanted[number % 2])))
    return [all(said), len(said), engine.held()]


def many_at_once() -> Any:
    """More than have a place between engine and workers, while requests run and while none does."""
    engine = Engine(asynchronous=True)
    wanted = [adapter(n, n) for n in (1, 2)]
    engine.send("long", None, 200)
    calls = [engine.call("add_lora", wanted[number % 2]) for number in range(MANY)]
    said = [engine.answer(call) for call in calls]
    calls = [engine.call("add_lora", wanted[number % 2]) for number in range(MANY)]
    return [all(said + [engine.answer(call) for call in calls]), engine.held()]


def refused() -> Any:
    """An adapter that is not there, while a request runs: what is said, and what the next call gets."""
    engine = Engine(asynchronous=True)
    engine.send("long", None, 200)
    absent = unloading.request(Path(patched.folder() / "absent"), 1)
    first, second = engine.call("add_lora", absent), engine.call("add_lora", adapter(2, 2))
    return [engine.answer(first), engine.answer(second), engine.held()]


def in_its_client() -> Any:
    """An engine core that is called in its client's process has no queue for an answer."""
    return ec.engine_core().add_lora(adapter(0, 1))


def another_packages_way() -> Any:
    """Another package has wrapped the executor's methods: what it sees, and what the client gets."""
    seen: list[Any] = []

    def wrapped(name: str) -> Any:
        original = getattr(InThreads, name)

        @functools.wraps(original)
        def method(self: Any, *arguments: Any) -> Any:
            seen.append(name)
            return original(self, *arguments)

        return method

    names = ("add_lora", "remove_lora")
    for name in names:
        setattr(InThreads, name, wrapped(name))
    try:
        engine = Engine(asynchronous=True)
        calls = (("add_lora", adapter(0, 1)), ("remove_lora", 1))
        return [[engine.answer(engine.call(*call)) for call in calls], seen]
    finally:
        for name in names:
            delattr(InThreads, name)


def is_patched() -> bool:
    return original_of(vllm_core.EngineCore.add_lora) is not None


def run_all() -> dict[str, Any]:
    return {
        "steps": while_steps_go_on(asynchronous=False),
        "steps, asynchronous": while_steps_go_on(asynchronous=True),
        "removed": removed_while_steps_go_on(),
        "removed last": removed_with_its_last_request(),
        "idle": while_idle(),
        "last": at_the_end_of_the_last_request(),
        "many": many_at_once(),
        "refused": refused(),
        "in its client": in_its_client(),
        "another package": another_packages_way(),
        "patched": is_patched(),
    }
