"""Run inside a vLLM release: adapters that are read before an engine adds them, while it takes steps.

Each function answers with plain values; tests/vllm_plugin/patches/test_reading_ahead.py says which
are right. What vLLM's AsyncLLM sends over a socket is called here.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lorashard import SplitRequest, split_adapter
from tests.vllm_plugin import engine_core as ec
from tests.vllm_plugin import patched, unloading
from tests.vllm_plugin.harness_selfcheck import adapter_of

from vllm.v1.engine.async_llm import AsyncLLM  # isort: skip

from lorashard.vllm_plugin.engine.live import moe_wrappers
from lorashard.vllm_plugin.load import filled_region
from lorashard.vllm_plugin.load.device_copy import DeviceCopy
from lorashard.vllm_plugin.load.read_ahead import ReadAhead
from lorashard.vllm_plugin.patches import reading_ahead

STEPS = 8  # that the engine takes while an adapter is read


class Client:
    """What AsyncLLM sends to, and the engine's step after each call."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.vllm_config = core.vllm_config
        self.calls: list[str] = []
        self.after_call = core.step_fn
        self.engine_core = SimpleNamespace(add_lora_async=self._send)

    async def _send(self, request: Any) -> Any:
        mark = str(request.base_model_name or "no mark")
        self.calls.append(mark.rpartition(": ")[0] or mark)
        answer = self.core.add_lora(request)
        self.after_call()
        return answer

    def add(self, request: Any) -> Any:
        return asyncio.run(AsyncLLM.add_lora(self, request))


def loaders(core: Any) -> list[Any]:
    return [unloading.unloading_loader(worker) for worker in core.model_executor.workers]


def shards_at(path: Path, seed: int = 0) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    split_adapter(adapter_of("L1", seed).write(path.with_name("plain")), path, SplitRequest(2))
    return path


def loads_of(core: Any) -> list[str]:
    """The threads of all loads from now on."""
    seen: list[str] = []
    for loader in loaders(core):
        load = loader.load

        def noted(*args: Any, load: Any = load, **kwargs: Any) -> Any:
            seen.append(threading.current_thread().name.partition("-")[0])
            return load(*args, **kwargs)

        loader.load = noted
    return seen


def while_it_takes_steps(form: str, *, asynchronous: bool = False) -> Any:
    """How far a request comes while an adapter is read, which threads read, and what is served."""
    core = ec.engine_core(asynchronous=asynchronous)
    make = shards_at if form == "shards" else unloading.adapter_at
    path = make(patched.folder() / form)
    first = unloading.request(make(patched.folder() / "first", seed=1), 2)
    core.add_lora(first)
    ec.send(core, "long", first, 60)
    core.step_fn()
    is_free = threading.Event()
    seen = loads_of(core)
    for loader in loaders(core):
        load = loader.load

        def slowly(*args: Any, load: Any = load, **kwargs: Any) -> Any:
            is_free.wait(60)
            return load(*args, **kwargs)

        loader.load = slowly
    client = Client(core)

    def step() -> None:
        core.step_fn()
        if len(client.calls) >= STEPS:
            is_free.set()

    client.after_call = step
    begins = tokens_of(core, "long")
    added = client.add(unloading.request(path))
    came = tokens_of(core, "long") - begins
    wrong = unloading.serves(core, seed=0)
    ec.run_to_the_end(core)
    marks = [*dict.fromkeys(client.calls)]
    return [added, came >= STEPS, marks, sorted(seen), wrong, ec.loaded(core)]


def tokens_of(core: Any, name: str) -> int:
    return int(core.scheduler.requests[name].num_output_tokens)


def fails() -> Any:
    """A rank's file that ends too early: what is said, what is left, and whether all goes on."""
    core = ec.engine_core()
    path = shards_at(patched.folder() / "damaged")
    file = path / "ep-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    free = unloading.free_buffers(core)
    seen = loads_of(core)
    client = Client(core)
    said = ""
    try:
        client.add(unloading.request(path))
    except Exception as err:  # noqa: BLE001 - the answer
        said = f"{type(err).__name__}: {err}"
    del client
    left = [ec.loaded(core), len(seen)]
    for (
        worker
    ) in core.model_executor.workers:  # what the other one has: the ranks are no group here
        worker.remove_lora(1)
        unloading.unloading_loader(worker).ahead = None
    gc.collect()
    is_back = unloading.free_buffers(core) == free
    file.write_bytes(content)
    Client(core).add(unloading.request(path))
    return [said, left, is_back, unloading.serves(core, seed=0)]


def nobody_comes_for_it() -> Any:
    """Read, but not added; then another version at its path, by a request that is the same."""
    core = ec.engine_core()
    path = shards_at(patched.folder() / "mine")
    wanted = unloading.request(path)
    marked = reading_ahead._marked(wanted, reading_ahead._TO_BE_READ + "1")
    while not core.add_lora(marked):
        time.sleep(0.01)
    held = unloading.free_buffers(core)
    shards_at(path, seed=1)
    gc.disable()
    Client(core).add(wanted)
    served = unloading.serves(core, seed=1)
    core.remove_lora(1)
    back = unloading.free_buffers(core)
    gc.enable()
    return [served, [after - before for before, after in zip(held, back)]]


def two_at_once() -> Any:
    """The second is added as it always was, while the first is still being read."""
    core = ec.engine_core()
    first, second = (shards_at(patched.folder() / f"{n}", seed=n) for n in (0, 1))
    client = Client(core)
    is_free = threading.Event()
    for loader in loaders(core):
        ahead, load = threading.Event(), loader.load

        def slowly(*args: Any, load: Any = load, ahead: Any = ahead, **kwargs: Any) -> Any:
            if not ahead.is_set():  # the first
                ahead.set()
                is_free.wait(60)
            return load(*args, **kwargs)

        loader.load = slowly

    async def both() -> None:
        one = asyncio.create_task(AsyncLLM.add_lora(client, unloading.request(first, 1)))
        await asyncio.sleep(0)
        await AsyncLLM.add_lora(client, unloading.request(second, 2))
        is_free.set()
        await one

    asyncio.run(both())
    return [unloading.serves(core, 0, 1), unloading.serves(core, 1, 2), ec.loaded(core)]


def what_is_there_already() -> Any:
    """Calls for an adapter that is loaded, for one in memory, and without expert parallelism."""
    core = ec.engine_core()
    wanted = unloading.request(shards_at(patched.folder() / "mine"))
    core.add_lora(wanted)
    seen = loads_of(core)
    client = Client(core)
    client.add(wanted)
    without = Client(ec.engine_core(expert_parallel=False))
    without.add(unloading.request(unloading.adapter_at(patched.folder() / "plain")))
    return [client.calls, seen, without.calls]


def rests() -> Any:
    """Which threads could rest when an adapter is read ahead, and when the engine waits for one."""
    core = ec.engine_core()
    seen: list[str] = []

    def is_busy(_: ReadAhead) -> bool:
        seen.append(threading.current_thread().name)
        return False

    with (
        mock.patch("lorashard.vllm_plugin.load.rests._WORK_S", 0.0),
        mock.patch.object(ReadAhead, "_engine_is_busy", is_busy),
    ):
        Client(core).add(unloading.request(shards_at(patched.folder() / "ahead")))
        ahead = list(seen)
        core.add_lora(unloading.request(shards_at(patched.folder() / "waits", seed=1), 2))
    layers = len(moe_wrappers(loaders(core)[0]._manager))
    return [sorted(set(ahead)), len(ahead) >= 4 * layers, len(seen) == len(ahead)]


def written_ahead() -> Any:
    """Which threads write the layers, and what vLLM's packing has to do in the step."""
    core = ec.engine_core()
    seen: list[str] = []
    for loader in loaders(core):
        manager = loader._manager
        for module in manager.modules.values():
            for name in ("set_lora", "reset_lora"):
                noted_calls(module, name, seen)
        noted_calls(manager, "_create_merged_loras_inplace", seen)
    Client(core).add(unloading.request(shards_at(patched.folder() / "mine")))
    slots = [loader._manager.lora_index_to_id for loader in loaders(core)]
    last = [list(loader.last_report.stages)[-2:] for loader in loaders(core)]
    return [bool(seen), sorted(set(seen)), slots, unloading.serves(core, seed=0), last]


def noted_calls(owner: Any, name: str, seen: list[str]) -> None:
    """Have `seen` get the thread of each call."""
    method = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread().name)
        return method(*args, **kwargs)

    setattr(owner, name, noted)


def another_takes_the_slot() -> Any:
    """Two others are added after an adapter was read, and before it is: what each of them serves."""
    core = ec.engine_core()
    paths = [shards_at(patched.folder() / f"{n}", seed=n) for n in range(3)]
    first = unloading.request(paths[0], 1)
    to_be_read, was_read = (
        reading_ahead._marked(first, mark + "1")
        for mark in (reading_ahead._TO_BE_READ, reading_ahead._WAS_READ)
    )
    while not core.add_lora(to_be_read):
        time.sleep(0.01)
    ahead = [loader.slot_ahead for loader in loaders(core)]
    was_ready = [slot.is_ready for slot in ahead]
    for number in (1, 2):
        core.add_lora(unloading.request(paths[number], number + 1))
    served = [unloading.serves(core, seed=number, number=number + 1) for number in (1, 2)]
    is_ready = [slot.is_ready for slot in ahead]
    core.add_lora(was_read)
    return [
        was_ready,
        is_ready,
        [*served, unloading.serves(core, 0, 1), unloading.serves(core, 2, 3)],
    ]


def no_slot_is_free() -> Any:
    """The engine is full: which threads pack and write, and what is served."""
    core = ec.engine_core()
    paths = [shards_at(patched.folder() / f"{n}", seed=n) for n in range(3)]
    for number in (1, 2):
        core.add_lora(unloading.request(paths[number], number + 1))
    packs: list[str] = []
    writes: list[str] = []
    for loader in loaders(core):
        noted_calls(loader._manager, "_create_merged_loras_inplace", packs)
        for module in loader._manager.modules.values():
            noted_calls(module, "set_lora", writes)
    Client(core).add(unloading.request(paths[0], 1))
    return [
        sorted(set(packs)),
        sorted(set(writes)),
        unloading.serves(core, 0, 1),
        unloading.serves(core, 2, 3),
    ]


def in_place() -> Any:
    if "load_inplace" not in unloading.LoRARequest.__struct_fields__:
        return "not in this release"
    core = ec.engine_core()
    path = shards_at(patched.folder() / "mine")
    Client(core).add(unloading.request(path))
    shards_at(path, seed=1)
    seen = loads_of(core)
    slots = [list(loader._manager.lora_index_to_id) for loader in loaders(core)]
    Client(core).add(unloading.request(path, in_place=True))
    slots += [loader._manager.lora_index_to_id for loader in loaders(core)]
    return [unloading.serves(core, seed=1), sorted(seen), slots]


def copied_to_the_device() -> Any:
    """Read ahead, with a copy as on a GPU: what the layers get, what is kept, and what is served."""
    core = ec.engine_core()
    copies: list[DeviceCopy] = []
    got: list[Any] = []

    def begin_copy(region: Any, device: Any) -> DeviceCopy:
        copies.append(DeviceCopy(region, device))
        return copies[-1]

    def noted(module: Any, set_lora: Any) -> Any:
        def set_and_note(index: int, lora_a: Any, lora_b: Any) -> None:
            got.extend([*lora_a, *lora_b])
            set_lora(index, lora_a, lora_b)

        return set_and_note

    for loader in loaders(core):
        for module in moe_wrappers(loader._manager).values():
            module.set_lora = noted(module, module.set_lora)
    with mock.patch.object(filled_region, "begin_copy", begin_copy):
        Client(core).add(unloading.request(shards_at(patched.folder() / "mine")))
    kept = [
        tensor
        for worker in core.model_executor.workers
        for weights in worker.manager._adapter_manager._registered_adapters[1].loras.values()
        if isinstance(weights.lora_a, list)
        for tensor in [*weights.lora_a, *weights.lora_b]
    ]
    memory = [copy.bytes for copy in copies]
    return [
        len(copies),
        bool(got) and all(is_in(tensor, memory) for tensor in got if tensor is not None),
        bool(kept) and not any(is_in(tensor, memory) for tensor in kept if tensor is not None),
        [loader.prepared for loader in loaders(core)],
        unloading.serves(core, seed=0),
    ]


def is_in(tensor: Any, memory: list[Any]) -> bool:
    """Whether a tensor is a view of one of these."""
    return tensor.untyped_storage().data_ptr() in [
        whole.untyped_storage().data_ptr() for whole in memory
    ]


def run_all() -> dict[str, Any]:
    found = {
        "shards": partial(while_it_takes_steps, "shards"),
        "plain": partial(while_it_takes_steps, "plain"),
        "asynchronous": partial(while_it_takes_steps, "shards", asynchronous=True),
        "fails": fails,
        "nobody comes": nobody_comes_for_it,
        "two": two_at_once,
        "already there": what_is_there_already,
        "in place": in_place,
        "copied": copied_to_the_device,
        "rests": rests,
        "written ahead": written_ahead,
        "slot taken": another_takes_the_slot,
        "no slot": no_slot_is_free,
    }
    return {name: do() for name, do in found.items()}
