"""The part of the table of patches for data parallelism: engines that share experts."""

from __future__ import annotations

from lorashard import rules
from lorashard.vllm_plugin.patches import data_parallel
from lorashard.vllm_plugin.patches.apply import Patch, Wrap, source_line

_MANAGERS = "vllm.lora.worker_manager"
_WORKER = "vllm.v1.worker"


def _patch(
    target: tuple[str, str, str],
    parameters: tuple[str, ...],
    line: int,
    wrap: Wrap,
    *,
    why: str,
    how: str,
) -> Patch:
    """target: module, class or "", and method. line: of 0.33.0."""
    module, owner, method = target
    return Patch(
        module=module,
        owner=owner,
        method=method,
        parameters=parameters,
        why=why,
        how=how,
        upstream=source_line(module, line),
        hazard=rules.DATA_PARALLEL,
        since="0.24.0",
        until=None,
        wrap=wrap,
        only_for=data_parallel.DATA_PARALLEL,
    )


PATCHES = (
    _patch(
        (f"{_WORKER}.dp_utils", "", "_run_ar"),
        ("should_ubatch", "orig_num_tokens_per_ubatch"),
        57,
        data_parallel.wrap_run_all_reduce,
        why="Each data-parallel engine gives out LoRA slots on its own, but computes the experts of "
        "other engines' tokens by their slot numbers (V1 model runner).",
        how="What each engine has to say of LoRA goes along in the exchange before each step, and "
        "all write the same adapters into the same slots.",
    ),
    _patch(
        (f"{_WORKER}.gpu.dp_utils", "", "sync_cudagraph_and_dp_padding"),
        ("cudagraph_manager", "desired_batch_desc", "num_tokens"),
        45,
        data_parallel.wrap_sync,
        why="The same in the V2 model runner, where each engine also takes the CUDA graph for the "
        "number of its own adapters.",
        how="The same, and the graph is that for the adapters of all engines.",
    ),
    _patch(
        ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher", "dispatch"),
        ("self", "num_tokens"),
        233,
        data_parallel.wrap_dispatch,
        why="An engine without LoRA of its own takes a CUDA graph without LoRA kernels, and computes "
        "other engines' tokens without LoRA (V1 model runner).",
        how="The graph is that for the adapters of all engines.",
    ),
    _patch(
        (f"{_WORKER}.gpu.model_runner", "", "get_num_active_loras_for_dispatch"),
        ("lora_config", "lora_state", "req_ids", "dummy_run"),
        1821,
        data_parallel.wrap_num_active_loras,
        why="The adapters of a step are set only after the engines' exchange (V2 model runner).",
        how="They are noted before it, where vLLM counts them.",
    ),
    _patch(
        (_MANAGERS, "WorkerLoRAManager", "set_active_adapters"),
        ("self", "requests", "mapping"),
        194,
        data_parallel.wrap_set_active_adapters,
        why="It gives a step's adapters slots without asking other engines, and leaves the mapping of "
        "an earlier batch where no token has LoRA.",
        how="Slots are those agreed on, the mapping is always written, and slots that only other "
        "engines' tokens use are computed as well.",
    ),
    _patch(
        ("vllm.lora.model_manager", "LRUCacheLoRAModelManager", "activate_adapter"),
        ("self", "lora_id"),
        1441,
        data_parallel.wrap_activate_adapter,
        why="An adapter that is added takes the slot of another, on this engine alone.",
        how="It stays in host memory until a step of some engine uses it.",
    ),
    _patch(
        (_MANAGERS, "WorkerLoRAManager", "pin_adapter"),
        ("self", "adapter_id"),
        191,
        data_parallel.wrap_pin_adapter,
        why="An adapter that is pinned takes a slot on this engine alone.",
        how="It is pinned in host memory only.",
    ),
    _patch(
        (_MANAGERS, "WorkerLoRAManager", "remove_adapter"),
        ("self", "adapter_id"),
        234,
        data_parallel.wrap_remove_adapter,
        why="An adapter that this engine does not use any more may be in use on another one.",
        how="One that is in a slot goes as soon as all engines are to remove it.",
    ),
    _patch(
        (f"{_WORKER}.lora_model_runner_mixin", "LoRAModelRunnerMixin", "maybe_dummy_run_with_lora"),
        ("self", "lora_config"),
        258,
        data_parallel.wrap_dummy_run,
        why="Each step of an idle engine ends with all of its adapters removed.",
        how="The adapters stay where they are.",
    ),
    _patch(
        (f"{_WORKER}.gpu_worker", "Worker", "compile_or_warm_up_model"),
        ("self",),
        933,
        data_parallel.wrap_warm_up,
        why="While an engine warms up, the adapters in its slots are dummies of its own.",
        how="From its end on, slots are agreed on with the other engines.",
    ),
)
