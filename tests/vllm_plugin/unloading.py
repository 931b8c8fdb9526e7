"""Run inside a vLLM release: adapters that are unloaded, while requests use them or not.

Each function answers with plain values; tests/vllm_plugin/patches/test_unloading.py says which are
right.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.vllm_plugin import engine_core as ec  # first: nothing of the plugin is loaded yet

from vllm.entrypoints.openai.models import serving  # isort: skip
from vllm.lora.request import LoRARequest  # isort: skip
from vllm.v1.core.sched.scheduler import Scheduler  # isort: skip
from vllm.v1.engine.core import EngineCore  # isort: skip


def first_engine() -> bool:
    """Whether vLLM alone has loaded the plugin by the time that its first engine is there."""
    was_there = "lorashard.vllm_plugin" in sys.modules
    core = ec.engine_core()
    return not was_there and hasattr(core.scheduler, "_lorashard_adapter_uses")


IS_LOADED_BY_VLLM = first_engine()

from lorashard.vllm_plugin.engine.prefix_versions import PrefixVersions  # noqa: E402
from lorashard.vllm_plugin.patches import unloading  # noqa: E402
from tests.vllm_plugin import harness, patched  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import adapter_of, mismatches  # noqa: E402
from tests.vllm_plugin.loading import expected_of  # noqa: E402


def adapter_at(path: Path, seed: int = 0) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return adapter_of("L1", seed).write(path)


def request(path: Path, number: int = 1, *, in_place: bool = False) -> Any:
    return harness.request(None, path, f"a{number}", number, load_inplace=in_place)


def serves(core: Any, seed: int, number: int = 1) -> list[list[str]]:
    """What each worker's buffers have wrong of the adapter of a seed."""
    expected = expected_of(adapter_of("L1", seed))
    wrong = []
    for worker in core.model_executor.workers:
        slot = harness.slot_of(worker.manager, number)
        wrong.append(mismatches(worker.manager, slot, expected))
    return wrong


def free_buffers(core: Any) -> list[int]:
    loaders = (unloading_loader(worker) for worker in core.model_executor.workers)
    return [len(loader.regions.sizes()) for loader in loaders]


def unloading_loader(worker: ec.Worker) -> Any:
    from lorashard.vllm_plugin.patches.adapter_loading import attached_loader

    return attached_loader(worker.manager)


def idle() -> Any:
    """An adapter that no request uses: what removing it twice answers, and what is left of it."""
    core = ec.engine_core()
    before = free_buffers(core)
    core.add_lora(request(adapter_at(patched.folder())))
    held = free_buffers(core)
    gc.disable()
    answers = [core.remove_lora(1), core.remove_lora(1)]
    back = free_buffers(core)
    gc.enable()
    return [answers, ec.loaded(core), before == back, [a - b for a, b in zip(before, held)]]


def in_use(*, stock: bool = False, asynchronous: bool = False) -> Any:
    """Unloaded, and deleted, while two requests use it: each worker's adapters, then and after."""
    core = ec.engine_core(asynchronous=asynchronous)
    assert (core.batch_queue is not None) == asynchronous
    path = adapter_at(patched.folder() / "mine")
    before = free_buffers(core)
    core.add_lora(request(path))
    for name, tokens in (("short", 3), ("long", 9)):
        ec.send(core, name, request(path), tokens)
    core.step_fn()
    remove = EngineCore.remove_lora
    answer = (remove._lorashard_original if stock else remove)(core, 1)
    shutil.rmtree(path)
    then = ec.loaded(core)
    gc.disable()
    try:
        ec.run_to_the_end(core)
    except Exception as err:  # noqa: BLE001 - the answer
        return f"the engine ends: {type(err).__name__}"
    after = free_buffers(core)
    gc.enable()
    return [answer, then, ec.loaded(core), before == after]


def aborted() -> Any:
    core, path = ec.engine_core(), adapter_at(patched.folder())
    core.add_lora(request(path))
    ec.send(core, "long", request(path), 100)
    core.step()
    core.remove_lora(1)
    then = ec.loaded(core)
    core.abort_requests(["long"])
    return [then, ec.loaded(core)]


def comes_late() -> Any:
    """A request that was accepted before its adapter was unloaded, and deleted."""
    core, path = ec.engine_core(), adapter_at(patched.folder() / "mine")
    core.add_lora(request(path))
    ec.send(core, "first", request(path), 4)
    core.step()
    core.remove_lora(1)
    shutil.rmtree(path)
    ec.send(core, "late", request(path), 20)
    for _ in range(6):
        core.step()
    then = [len(core.scheduler.running), ec.loaded(core)]
    ec.run_to_the_end(core)
    return [then, ec.loaded(core)]


def same_number_again(how: str) -> Any:
    """New weights under the number of an adapter that a request still uses: what is served then."""
    core, path = ec.engine_core(), adapter_at(patched.folder() / "mine")
    core.add_lora(request(path))
    ec.send(core, "first", request(path), 8)
    core.step()
    core.remove_lora(1)
    adapter_at(path, seed=1)
    if how == "add_lora":
        core.add_lora(request(path))
    else:
        ec.send(core, "second", request(path), 30)
        core.step()
    wrong = serves(core, seed=1)
    ec.run_to_the_end(core)
    return [wrong, ec.loaded(core)]


def in_place() -> Any:
    """load_inplace: what is served, and how many tokens of the old version's prefix are."""
    if "load_inplace" not in LoRARequest.__struct_fields__:
        return "not in this release"
    core, path = ec.engine_core(), adapter_at(patched.folder())
    core.add_lora(request(path))
    cached = [cached_tokens(core, request(path))]
    adapter_at(path, seed=1)
    core.add_lora(request(path, in_place=True))
    return [serves(core, seed=1), [*cached, *(cached_tokens(core, request(path)) for _ in "ab")]]


def cached_tokens(core: Any, lora_request: Any) -> int:
    """Tokens of a prompt that the prefix cache has, for an adapter or the base model."""
    ec.send(core, "asks", lora_request, 1)
    found = core.scheduler.kv_cache_manager.get_computed_blocks(core.scheduler.requests["asks"])
    ec.run_to_the_end(core)
    return int(found[1])


def prefixes(*, stock: bool = False) -> dict[str, list[int]]:
    """Cached tokens of the same prompt, asked twice before and twice after unloading and loading."""
    core, path = ec.engine_core(), adapter_at(patched.folder())
    found: dict[str, list[int]] = {"a1": [], "a2": [], "base": []}
    if stock:
        unloading._prefix_versions.__class__ = SilentVersions
    core.add_lora(request(path, 1))
    core.add_lora(request(path, 2))
    for again in (False, True):
        if again:
            core.remove_lora(1)
            adapter_at(path, seed=1)
            core.add_lora(harness.request(None, path, "a1", 3))  # as the API server numbers it
        one = harness.request(None, path, "a1", 3) if again else request(path, 1)
        for name, lora in (("a1", one), ("a2", request(path, 2)), ("base", None)):
            found[name] += [cached_tokens(core, lora), cached_tokens(core, lora)]
    unloading._prefix_versions.__class__ = PrefixVersions
    return found


class SilentVersions(PrefixVersions):
    """As without the patch."""

    def version(self, name: str) -> str:
        return ""


def served(*, stock: bool = False) -> Any:
    """Through vLLM's OpenAIServingModels: its answers, and each worker's adapters, step by step."""
    core = ec.engine_core()
    models = serving.OpenAIServingModels(
        client_of(core), [SimpleNamespace(name="base", model_path="base")]
    )
    path = adapter_at(patched.folder())
    unload = type(models).unload_lora_adapter
    unload = unload._lorashard_original if stock else unload

    async def calls() -> list[Any]:
        steps = []
        for call, seed in (("load", 0), ("unload", 0), ("unload", 0), ("load", 1)):
            if call == "load":
                adapter_at(path, seed)
                wish = serving.LoadLoRAAdapterRequest(lora_name="mine", lora_path=str(path))
                answer = await models.load_lora_adapter(wish)
            else:
                wish = serving.UnloadLoRAAdapterRequest(lora_name="mine")
                answer = await unload(models, wish)
            said = answer if isinstance(answer, str) else answer.error.message
            steps.append([said, ec.loaded(core)])
        return steps

    steps = asyncio.run(calls())
    return [steps, serves(core, seed=1, number=models.lora_requests["mine"].lora_int_id)]


def client_of(core: Any) -> Any:
    """Stand-in for AsyncLLM, which sends the same over a socket."""

    def sends(name: str) -> Callable[..., Any]:
        async def send(*args: Any) -> Any:
            return getattr(core, name)(*args)

        return send

    return SimpleNamespace(
        vllm_config=core.vllm_config,
        model_config=core.vllm_config.model_config,
        add_lora=sends("add_lora"),
        remove_lora=sends("remove_lora"),
        input_processor=None, io_processor=None, renderer=None, processor=None,
    )  # fmt: skip


def without_expert_parallelism() -> Any:
    """Whether an adapter in use is removed at once, as vLLM does."""
    core, path = ec.engine_core(expert_parallel=False), adapter_at(patched.folder())
    core.add_lora(request(path))
    ec.send(core, "long", request(path), 9)
    core.step()
    return [core.remove_lora(1), ec.loaded(core), hasattr(core.scheduler, unloading._USES)]


def subclass_of_the_scheduler() -> list[str]:
    """What is said of a scheduler of another package, which extends two of the patched methods."""
    from lorashard.vllm_plugin.patches.foreign import find_foreign_patches

    class Theirs(Scheduler):  # type: ignore[misc]
        def add_request(self, request: Any) -> None:
            super().add_request(request)

        def _free_request(self, request: Any, **options: Any) -> Any:
            return None

    assert Theirs
    return [
        f"{found.place.rpartition('.')[2]} {found.is_harmless}" for found in find_foreign_patches()
    ]


def run_all() -> dict[str, Any]:
    return {
        "loaded by vLLM": IS_LOADED_BY_VLLM,
        "idle": idle(),
        "in use": in_use(),
        "in use, stock": in_use(stock=True),
        "in use, asynchronous": in_use(asynchronous=True),
        "in use, asynchronous, stock": in_use(stock=True, asynchronous=True),
        "aborted": aborted(),
        "late": comes_late(),
        "add_lora": same_number_again("add_lora"),
        "a request": same_number_again("a request"),
        "in place": in_place(),
        "prefixes": prefixes(),
        "prefixes, stock": prefixes(stock=True),
        "served": served(),
        "served, stock": served(stock=True),
        "without EP": without_expert_parallelism(),
        "subclass": subclass_of_the_scheduler(),
    }
