"""The table of patches: what is changed in vLLM, why, and from and until which release."""

from __future__ import annotations

from lorashard.vllm_plugin import seams
from lorashard.vllm_plugin.patch import Patch

_SOURCE = "https://github.com/vllm-project/vllm/blob/v0.33.0/vllm"

_MANAGERS = "vllm.lora.worker_manager"
_LAYERS = "vllm.lora.layers.fused_moe"

PATCHES: tuple[Patch, ...] = (
    Patch(
        module=_MANAGERS,
        owner="WorkerLoRAManager",
        method="_load_adapter",
        parameters=("self", "lora_request"),
        why="Every rank parses and repacks the whole adapter and takes the experts [ep_rank * n, "
        "(ep_rank + 1) * n), which are the wrong ones where experts are uneven or round-robin.",
        how="During the call, lorashard's loader stands in for LoRAModel: it reads this rank's "
        "rows, as each layer's _expert_map names them.",
        upstream=f"{_SOURCE}/lora/model_manager.py#L1144",
        since="0.22.1",
        until=None,
        wrap=seams.wrap_load_adapter,
    ),
    *(
        Patch(
            module=_MANAGERS,
            owner=owner,
            method="create_lora_manager",
            parameters=("self", "model", "vllm_config"),
            why="What would be silently wrong must stop the start, not show in the answers.",
            how="Checks the engine and vLLM's own contracts around the call, and prepares the "
            "loader and its pinned buffers.",
            upstream=f"{_SOURCE}/lora/worker_manager.py#L87",
            since="0.22.1",
            until=None,
            wrap=seams.wrap_create_lora_manager,
        )
        for owner in ("WorkerLoRAManager", "LRUCacheWorkerLoRAManager")
    ),
    *(
        Patch(
            module=_LAYERS,
            owner=owner,
            method="create_lora_weights",
            parameters=("self", "max_loras", "lora_config", "model_config"),
            why="--fully-sharded-loras with --enable-expert-parallel stops at an assertion.",
            how="MoE layers under expert parallelism are built as if LoRA were not fully sharded; "
            "dense layers stay sharded.",
            upstream=f"{_SOURCE}/lora/layers/fused_moe.py#L244",
            since="0.22.1",
            until=None,
            wrap=seams.wrap_create_lora_weights,
        )
        for owner in ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA")
    ),
    Patch(
        module="vllm.engine.arg_utils",
        owner="EngineArgs",
        method="create_engine_config",
        parameters=("self",),
        why="A refusal after minutes of loading weights, from inside a worker, is hard to read.",
        how="Looks at the finished configuration for what lorashard refuses.",
        upstream=f"{_SOURCE}/engine/arg_utils.py#L2245",
        since="0.22.1",
        until=None,
        wrap=seams.wrap_create_engine_config,
    ),
)
