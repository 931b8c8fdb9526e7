"""The part of the table of patches for adapters that come and go while requests run."""

from __future__ import annotations

from lorashard import rules
from lorashard.vllm_plugin.patches import reading_ahead, refused_adds, same_names, unloading
from lorashard.vllm_plugin.patches.apply import SOURCE, VLLM, Patch, source_line

_ENGINE = "vllm.v1.engine.core"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ADD_LORA = (
    "An adapter of that number that is still to be removed goes first. While the workers add the new "
    "one, the engine goes on scheduling (since 0.17.1)."
)
_REMOVE_LORA = "The adapter is removed once no request uses it, and the engine goes on scheduling (since 0.17.1)."

PATCHES: tuple[Patch, ...] = (
    Patch(
        module="vllm.v1.engine.async_llm",
        owner="AsyncLLM",
        method="add_lora",
        parameters=("self", "lora_request"),
        why="While an adapter is read, no running request goes on.",
        how="Under expert parallelism the workers read the adapter in a thread first; the engine adds "
        "it once it is in memory.",
        upstream=f"{SOURCE}/v1/engine/async_llm.py#L1233",
        since="0.16.0",
        until=None,
        wrap=reading_ahead.wrap_async_add_lora,
    ),
    Patch(
        module="vllm.entrypoints.openai.models.serving",
        owner="OpenAIServingModels",
        method="unload_lora_adapter",
        parameters=("self", "request"),
        why="At /v1/unload_lora_adapter the server forgets the name, and the engine keeps the adapter.",
        how="Has the engine remove the adapter, too, under expert parallelism.",
        upstream=f"{VLLM}/issues/54839",
        hazard=rules.UNLOADED_ONLY_BY_NAME,
        since="0.16.0",
        until=None,
        wrap=unloading.wrap_unload_lora_adapter,
    ),
    *(
        Patch(
            module=module,
            owner=owner,
            method=method,
            parameters=("self", *parameters),
            why="If an adapter is removed while requests use it, their next step loads it again from "
            "its path, and if nothing is there any more, the engine ends.",
            how=how,
            upstream=source_line(module, line),
            since="0.16.0",
            until=None,
            wrap=wrap,
        )
        for module, owner, method, parameters, line, how, wrap in (
            (
                _SCHEDULER,
                "Scheduler",
                "__init__",
                ("vllm_config",),
                87,
                "Under expert parallelism it keeps a record of the adapters in use.",
                unloading.wrap_init,
            ),
            (
                _ENGINE,
                "EngineCore",
                "remove_lora",
                ("lora_id",),
                1091,
                _REMOVE_LORA,
                unloading.wrap_remove_lora,
            ),
            (
                _ENGINE,
                "EngineCore",
                "add_lora",
                ("lora_request",),
                1088,
                _ADD_LORA,
                unloading.wrap_add_lora,
            ),
            (
                _SCHEDULER,
                "Scheduler",
                "add_request",
                ("request",),
                2931,
                "The request's adapter is noted.",
                unloading.wrap_add_request,
            ),
            (
                _SCHEDULER,
                "Scheduler",
                "_free_request",
                ("request",),
                3031,
                "An adapter that is to be removed goes with its last request.",
                unloading.wrap_free_request,
            ),
        )
    ),
    Patch(
        module="vllm.v1.core.kv_cache_utils",
        owner="",
        method="_gen_lora_extra_hash_keys",
        parameters=("request",),
        why="The prefix cache knows an adapter by its name (since 0.31.0 by its path as well), so a "
        "new version under the same name is served what the one before has left there.",
        how="After an adapter was unloaded or replaced in place, its name has other keys.",
        upstream=f"{SOURCE}/v1/core/kv_cache_utils.py#L590",
        hazard=rules.STALE_PREFIX_CACHE,
        since="0.16.0",
        until=None,
        wrap=unloading.wrap_gen_lora_extra_hash_keys,
    ),
    Patch(
        module="vllm.v1.executor.abstract",
        owner="Executor",
        method="add_lora",
        parameters=("self", "lora_request"),
        why="If an adapter cannot be added, the executor reads the answers of the ranks up to the first "
        "failure, and takes the others for answers to the next calls.",
        how="Under expert parallelism a worker's failure is an answer, and is raised once all have answered.",
        upstream=f"{VLLM}/issues/49972",
        hazard=rules.ANSWERS_LEFT_BEHIND,
        since="0.16.0",
        until=None,
        wrap=refused_adds.wrap_executor_add_lora,
    ),
    *(
        Patch(
            module="vllm.lora.request",
            owner="LoRARequest",
            method=method,
            parameters=parameters,
            why="Requests are equal if the names of their adapters are, so that a step with two versions "
            "of a name makes sure of one alone; the other may have lost its slot, and that ends the engine.",
            how="Equal requests have the same number as well.",
            upstream=f"{VLLM}/issues/30931",
            hazard=rules.VERSIONS_OF_A_NAME,
            since="0.16.0",
            until=None,
            wrap=wrap,
        )
        for method, parameters, wrap in (
            ("__eq__", ("self", "value"), same_names.wrap_eq),
            ("__hash__", ("self",), same_names.wrap_hash),
        )
    ),
)
