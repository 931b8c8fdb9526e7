"""Unloading: an adapter gives its slot and its host memory back on every rank.

`/v1/unload_lora_adapter` only forgets the name, so it is told to the engine here. And the engine
removes an adapter once no request uses it. All of it is for engines with LoRA and expert
parallelism; others keep vLLM's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorashard.vllm_plugin.engine.adapter_uses import AdapterUses
from lorashard.vllm_plugin.engine.facts import has_lora_and_ep
from lorashard.vllm_plugin.engine.prefix_versions import PrefixVersions
from lorashard.vllm_plugin.patches.answered_later import add_between_steps, remove_between_steps
from lorashard.vllm_plugin.patches.data_parallel import limit_adapters
from lorashard.vllm_plugin.patches.reading_ahead import is_to_be_read

_USES = "_lorashard_adapter_uses"  # an attribute of vLLM's Scheduler

# One for all engines of a process: vLLM makes its keys in a function that knows no engine.
_prefix_versions = PrefixVersions()


def _uses(scheduler: Any) -> AdapterUses | None:
    uses: AdapterUses | None = getattr(scheduler, _USES, None)
    return uses


def wrap_unload_lora_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """OpenAIServingModels.unload_lora_adapter: the engine is told as well."""

    async def unload_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_lora_and_ep(self.engine_client.vllm_config):
            return await original(self, request, *args, **kwargs)
        name = request.lora_name
        async with self.lora_resolver_lock[name]:  # a load under that name is finished first
            known = self.lora_requests.get(name)
        answer = await original(self, request, *args, **kwargs)
        now = self.lora_requests.get(name)
        if known is not None and (now is None or now.lora_int_id != known.lora_int_id):
            await self.engine_client.remove_lora(known.lora_int_id)
        return answer

    return unload_lora_adapter


def wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scheduler.__init__: it notes which requests use which adapter, and how many it may use at once.

    Not the engine core's: vLLM loads the plugins inside of that.
    """

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if has_lora_and_ep(vllm_config):
            setattr(self, _USES, AdapterUses(self.requests, _prefix_versions))
            limit_adapters(self, vllm_config)

    return init


def wrap_add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineCore.add_lora: what an adapter of that number has left behind goes first.

    The engine goes on while the workers add it.
    """

    def add_lora(self: Any, lora_request: Any) -> Any:
        uses = _uses(self.scheduler)
        if uses is None:
            return original(self, lora_request)
        if not is_to_be_read(lora_request):
            uses.before_load(lora_request)
        return add_between_steps(self, lora_request, original)

    return add_lora


def wrap_remove_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineCore.remove_lora: once no request uses the adapter. The engine goes on meanwhile."""

    def remove_lora(self: Any, lora_id: int) -> Any:
        uses = _uses(self.scheduler)
        if uses is None:
            return original(self, lora_id)
        return uses.remove(lora_id, lambda number: remove_between_steps(self, number, original))

    return remove_lora


def wrap_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scheduler.add_request: the use of an adapter begins."""

    def add_request(self: Any, request: Any) -> Any:
        uses = _uses(self)
        if uses is not None:
            uses.request_came(request)
        return original(self, request)

    return add_request


def wrap_free_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Scheduler._free_request: the use of an adapter ends."""

    def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        freed = original(self, request, *args, **kwargs)
        uses = _uses(self)
        if uses is not None:
            uses.request_ended(request)
        return freed

    return _free_request


def wrap_gen_lora_extra_hash_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_gen_lora_extra_hash_keys`: an adapter under the name of an earlier one has other keys."""

    def _gen_lora_extra_hash_keys(request: Any) -> Any:
        keys = original(request)
        if keys and (version := _prefix_versions.version(request.lora_request.lora_name)):
            # Strings up to 0.30, tuples of three since.
            return [*keys, version if isinstance(keys[0], str) else ("lora", "version", version)]
        return keys

    return _gen_lora_extra_hash_keys
