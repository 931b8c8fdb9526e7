"""The table of patches: what is changed in vLLM, why and how, and in which releases."""

from __future__ import annotations

from lorashard import rules
from lorashard.vllm_plugin.patches import (
    activation,
    activations,
    adapter_adding,
    adapter_loading,
    adapter_packing,
    data_parallel_table,
    engine_start,
    expert_parallel,
    fully_sharded,
    peft_patterns,
    punica,
    rebalancing,
    swaps_table,
    warm_up,
)
from lorashard.vllm_plugin.patches.apply import SOURCE, VLLM, Patch, source_line

_MANAGERS = "vllm.lora.worker_manager"
_LAYERS = "vllm.lora.layers.fused_moe"
_PUNICA = "vllm.lora.punica_wrapper.punica_gpu"
_MOE = "vllm.model_executor.layers.fused_moe"
_EPLB = "vllm.distributed.eplb"

PATCHES: tuple[Patch, ...] = (
    Patch(
        module=_MANAGERS,
        owner="WorkerLoRAManager",
        method="_load_adapter",
        parameters=("self", "lora_request"),
        why="Every rank parses and repacks the whole adapter and takes the experts [ep_rank * n, "
        "(ep_rank + 1) * n), which are the wrong ones if experts are uneven or round-robin.",
        how="During the call, lorashard's loader stands in for LoRAModel and reads the experts of "
        "this rank alone, those in each layer's _expert_map.",
        upstream=f"{SOURCE}/lora/model_manager.py#L1144",
        hazard=rules.UNEVEN_EXPERTS,
        since="0.16.0",
        until=None,
        wrap=adapter_loading.wrap_load_adapter,
    ),
    *(
        Patch(
            module=_MANAGERS,
            owner=owner,
            method="add_adapter",
            parameters=("self", request),
            why="If an adapter that all ranks have loaded cannot be activated on one of them, the "
            "ranks differ in what they have, and the next request waits for ever.",
            how="After a load under expert parallelism the ranks agree once more; if one has failed, "
            "they take the adapter out again, and drop what not every rank still has.",
            upstream=f"{SOURCE}/lora/worker_manager.py#L{line}",
            hazard=rules.RANKS_DIFFER,
            since="0.16.0",
            until=None,
            wrap=adapter_adding.wrap_add_adapter,
        )
        for owner, request, line in (
            ("WorkerLoRAManager", "adapter_request", 224),
            ("LRUCacheWorkerLoRAManager", "lora_request", 288),
        )
    ),
    *(
        Patch(
            module=_MANAGERS,
            owner=owner,
            method="create_lora_manager",
            parameters=("self", "model", "vllm_config"),
            why="An engine whose answers would be silently wrong must not start.",
            how="Checks the engine and what the plugin relies on in vLLM, and prepares the loader "
            "and its pinned buffers.",
            upstream=f"{SOURCE}/lora/worker_manager.py#L87",
            since="0.16.0",
            until=None,
            wrap=engine_start.wrap_create_lora_manager,
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
            "dense layers are sharded.",
            upstream=f"{SOURCE}/lora/layers/fused_moe.py#L244",
            since="0.16.0",
            until=None,
            wrap=fully_sharded.wrap_create_lora_weights,
        )
        for owner in ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA")
    ),
    Patch(
        module="vllm.engine.arg_utils",
        owner="EngineArgs",
        method="create_engine_config",
        parameters=("self",),
        why="A refusal from inside a worker comes after minutes of loading and is hard to read.",
        how="Checks the finished configuration for whatever it alone shows to be wrong.",
        upstream=f"{SOURCE}/engine/arg_utils.py#L2245",
        since="0.16.0",
        until=None,
        wrap=engine_start.wrap_create_engine_config,
    ),
    Patch(
        module="vllm.lora.model_manager",
        owner="LoRAModelManager",
        method="_add_adapter",
        parameters=("self", "lora"),
        why="An adapter that another package has made of tensors gets the experts [ep_rank * n, "
        "(ep_rank + 1) * n), which are the wrong ones if experts are uneven or round-robin.",
        how="Experts that are not packed yet are packed first, those in each layer's _expert_map.",
        upstream=f"{SOURCE}/lora/model_manager.py#L421",
        hazard=rules.PATCHED_BY_OTHERS,
        since="0.16.0",
        until=None,
        wrap=adapter_packing.wrap_add_adapter_to_manager,
    ),
    Patch(
        module="vllm.lora.model_manager",
        owner="LoRAModelManager",
        method="activate_adapter",
        parameters=("self", "lora_id"),
        why="While an adapter is written into its slot, no running request goes on; and what is "
        "written after a rebalance has the places that experts had before.",
        how="An adapter that was read before is in a free slot already. With EPLB, rows go to where "
        "the experts are now.",
        upstream=f"{SOURCE}/lora/model_manager.py#L355",
        since="0.16.0",
        until=None,
        wrap=activation.wrap_activate_adapter,
    ),
    Patch(
        module="vllm.v1.worker.gpu_worker",
        owner="Worker",
        method="sleep",
        parameters=("self", "level"),
        why="Sleep mode gives up the memory of the LoRA slots, into which a thread may be writing an "
        "adapter that was read before it is added.",
        how="The thread stops first; the adapter is written as it is added.",
        upstream=f"{SOURCE}/v1/worker/gpu_worker.py#L185",
        since="0.16.0",
        until=None,
        wrap=activation.wrap_sleep,
    ),
    Patch(
        module="vllm.lora.peft_helper",
        owner="PEFTHelper",
        method="from_dict",
        parameters=("cls", "config_dict"),
        why="It drops rank_pattern and alpha_pattern, so that an adapter that another package has "
        "in memory is scaled wrongly.",
        how="What it returns has them, for lorashard's loader.",
        upstream=f"{SOURCE}/lora/peft_helper.py#L156",
        hazard=rules.PATTERNS_IGNORED,
        since="0.16.0",
        until="0.31.0",
        wrap=peft_patterns.wrap_from_dict,
        needed=peft_patterns.drops_patterns,
    ),
    Patch(
        module="vllm.lora.model_manager",
        owner="LoRAModelManager",
        method="create_dummy_lora",
        parameters=("self", "lora_id", "rank"),
        why="The warm-up makes a dummy adapter with all the model's experts, too many for a rank's "
        "buffers (until 0.21.0), and fails on a rank without experts.",
        how="MoE layers for which vLLM cannot make one get zeros in the size of their buffers.",
        upstream=f"{SOURCE}/lora/model_manager.py#L648",
        since="0.16.0",
        until=None,
        wrap=warm_up.wrap_create_dummy_lora,
    ),
    Patch(
        module=_LAYERS,
        owner="FusedMoEWithLoRA",
        method="__init__",
        parameters=("self", "base_layer"),
        why="LoRA with --enable-expert-parallel stops at an assertion, and without it each expert "
        "would be cut by tensor-parallel rank as well.",
        how="The layer keeps the kernel of its quant method and takes tp_size and tp_rank from "
        "the MoE layer (1 and 0).",
        upstream=f"{VLLM}/pull/40867",
        since="0.16.0",
        until="0.20.2",
        wrap=expert_parallel.wrap_init,
        needed=expert_parallel.refuses_expert_parallelism,
    ),
    Patch(
        module=_PUNICA,
        owner="PunicaWrapperGPU",
        method="moe_lora_align_block_size",
        parameters=("self", "topk_ids", "num_tokens", "block_size", "num_experts", "max_loras",
                    "adapter_enabled", "expert_map"),
        why="Under expert parallelism the CUDA op counts the local experts but gets global ids, "
        "and vLLM indexes the expert map with its unwritten output: an illegal memory access.",
        how="The op gets the number of all experts and the map itself, and ids that start as -1.",
        upstream=f"{VLLM}/pull/40867",
        hazard=rules.SORTED_BY_LOCAL_EXPERT,
        since="0.16.0",
        until="0.20.2",
        wrap=punica.wrap_align_block_size,
        needed=punica.maps_uninitialised_ids,
    ),
    Patch(
        module=_PUNICA,
        owner="PunicaWrapperGPU",
        method="add_lora_fused_moe",
        parameters=("self", "y", "x", "lora_a_stacked"),
        why="Requests for the base model can get the deltas of an earlier adapter (until 0.23.0), "
        "and the kernel cannot run on a rank without experts.",
        how="Does nothing for a batch without LoRA or on a rank without experts.",
        upstream=f"{VLLM}/issues/42008",
        hazard=rules.EARLIER_DELTAS,
        since="0.16.0",
        until=None,
        wrap=punica.wrap_add_lora_fused_moe,
    ),
    Patch(
        module=f"{_MOE}.fused_moe_modular_method",
        owner="FusedMoEModularMethod",
        method="apply",
        parameters=("self", "layer", "x", "topk_weights", "topk_ids"),
        why="LoRA on FP8 experts is computed from quantised activations without their scale.",
        how="Puts the layer's input into the LoRA context while the experts run.",
        upstream=f"{VLLM}/pull/42120",
        hazard=rules.FP8_ACTIVATIONS,
        since="0.20.0",
        until="0.23.0",
        wrap=activations.wrap_modular_apply,
        needed=activations.gives_lora_quantised_input,
    ),
    *(
        Patch(
            module=module,
            owner="LoRAExpertsMixin",
            method="apply_w13_lora",
            parameters=("self", "lora_context", "y", "x"),
            why="LoRA on FP8 experts is computed from quantised activations without their scale.",
            how="Takes the input from the LoRA context if the one passed in is quantised.",
            upstream=f"{VLLM}/pull/42120",
            hazard=rules.FP8_ACTIVATIONS,
            since=since,
            until=until,
            wrap=activations.wrap_apply_w13_lora,
            needed=activations.gives_lora_quantised_input,
        )
        for module, since, until in (
            (f"{_MOE}.lora_experts_mixin", "0.20.0", "0.21.0"),
            (f"{_MOE}.experts.lora_experts_mixin", "0.22.0", "0.23.0"),
        )
    ),
    *(
        Patch(
            module=module,
            owner=owner,
            method=method,
            parameters=(*(("self",) if owner else ()), *parameters),
            why="A rebalance moves the experts' weights but not their LoRA.",
            how=how,
            upstream=source_line(module, line),
            hazard=rules.EPLB,
            since="0.24.0",
            until=None,
            wrap=wrap,
            only_for=rebalancing.EPLB,
        )
        for module, owner, method, parameters, line, how, wrap in (
            (f"{_EPLB}.eplb_state", "EplbState", "add_model", ("model", "model_config"), 362,
             "Notes which layer has which number in EPLB, and where its experts are.",
             rebalancing.wrap_add_model),
            (f"{_EPLB}.eplb_state", "", "rearrange_expert_weights_inplace",
             ("old_global_expert_indices", "new_global_expert_indices", "expert_weights",
              "expert_buffer", "ep_group", "communicator", "is_profile"), 935,
             "After the weights of a layer, the LoRA of its experts goes the same way.", rebalancing.wrap_rearrange),
            (f"{_EPLB}.async_worker", "", "transfer_layer",
             ("old_layer_indices", "new_layer_indices", "expert_weights", "expert_weights_buffer",
              "ep_group", "communicator", "is_profile"), 143,
             "After the weights of a layer, the LoRA of its experts goes the same way.",
             rebalancing.wrap_transfer_layer),
            (f"{_EPLB}.eplb_state", "", "move_from_buffer",
             ("expert_weights", "expert_weights_buffers", "transfer_metadata"), 1432,
             "After the weights of a layer, the LoRA that has come for it is put in place.",
             rebalancing.wrap_move_from_buffer),
            (f"{_EPLB}.eplb_state", "", "_commit_eplb_maps",
             ("model_state", "new_physical_to_logical_map"), 1388,
             "Adapters are loaded for the new places from then on.", rebalancing.wrap_commit_maps),
            (f"{_EPLB}.eplb_state", "", "_commit_eplb_maps_for_layer",
             ("model_state", "new_physical_to_logical_map", "layer"), 1352,
             "The same for a layer, and slots that were written meanwhile are written again.",
             rebalancing.wrap_commit_maps_for_layer),
        )
    ),
    *swaps_table.PATCHES,
    *data_parallel_table.PATCHES,
)  # fmt: skip
