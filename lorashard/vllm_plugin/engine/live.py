"""The MoE layers of the running engine: vLLM's objects -> LiveExperts.

The placement is read from each layer's own `_expert_map`, never computed from the ep rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorashard.adapter.base_model import gate_up_of
from lorashard.errors import PlacementError
from lorashard.vllm_options import Wrapper

WRAPPER_2D = "FusedMoEWithLoRA"
WRAPPER_3D = "FusedMoE3DWithLoRA"
_MOE_STACKS = (
    "w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked",
)  # fmt: skip
_DENSE_STACKS = ("lora_a_stacked", "lora_b_stacked")


@dataclass(frozen=True, slots=True)
class LiveExperts:
    """One MoE layer of the running engine, as its LoRA wrapper sees it.

    name: the module's name in vLLM's model. wrapper: "2d" for FusedMoEWithLoRA, "3d" for
    FusedMoE3DWithLoRA. local_experts: global ids in slot order, from the layer's own `_expert_map`;
    with redundant experts (EPLB) a rank may have one twice.
    buffer_intermediate: I of the device buffers, which some backends pad.
    interleaved: gate and up rows alternate in the 3-D class (gpt-oss).
    shared_outer: the engine keeps one gate/up A and one down B for all experts
    (`enable_moe_shared_loras`).
    """

    name: str
    wrapper: Wrapper
    num_experts: int
    ep_rank: int
    ep_size: int
    local_experts: tuple[int, ...]
    gated: bool
    hidden_size: int
    intermediate_size: int
    buffer_intermediate: int
    max_lora_rank: int
    interleaved: bool
    shared_outer: bool


def moe_wrappers(manager: Any) -> dict[str, Any]:
    """The MoE LoRA wrappers of a LoRAModelManager, by module name in vLLM's model."""
    return {
        name: module
        for name, module in manager.modules.items()
        if type(module).__name__ in (WRAPPER_2D, WRAPPER_3D)
    }


def live_experts(name: str, wrapper: Any, *, interleaved: bool) -> LiveExperts:
    """Facts about one MoE layer. Raises PlacementError if they contradict each other."""
    config = wrapper.base_layer.moe_config
    parallel = config.moe_parallel_config
    is_3d = type(wrapper).__name__ == WRAPPER_3D
    lora_b = wrapper.w13_lora_b_stacked[0]
    local = local_experts(wrapper, name)
    if len(local) != lora_b.shape[1]:
        raise PlacementError(
            f"{name}: the expert map names {len(local)} local experts, but the LoRA buffers have "
            f"{lora_b.shape[1]}."
        )
    unpadded_hidden = getattr(config, "hidden_dim_unpadded", None)
    unpadded_inner = getattr(config, "intermediate_size_per_partition_unpadded", None)
    inner = unpadded_inner or config.intermediate_size_per_partition
    # With tp_size > 1 set_lora itself moves the second half to its place in the buffer.
    padded = config.intermediate_size_per_partition if wrapper.tp_size == 1 else inner
    return LiveExperts(
        name=name,
        wrapper="3d" if is_3d else "2d",
        num_experts=num_logical_experts(config),
        ep_rank=int(parallel.ep_rank) if parallel.use_ep else 0,
        ep_size=int(parallel.ep_size) if parallel.use_ep else 1,
        local_experts=local,
        gated=bool(config.is_act_and_mul),
        hidden_size=int(unpadded_hidden or config.hidden_dim),
        intermediate_size=int(inner) * wrapper.tp_size,
        buffer_intermediate=int(padded) * wrapper.tp_size,
        max_lora_rank=int(lora_b.shape[-1]),
        interleaved=interleaved,
        shared_outer=not is_3d and bool(getattr(wrapper, "enable_moe_shared_loras", False)),
    )


def num_logical_experts(moe_config: Any) -> int:
    """The model's experts: with EPLB, `num_experts` counts its redundant ones too."""
    if not getattr(moe_config.moe_parallel_config, "enable_eplb", False):
        return int(moe_config.num_experts)
    return int(getattr(moe_config, "num_logical_experts", moe_config.num_experts))


def routed_experts(wrapper: Any) -> Any:
    """What has the attributes of a layer's routed experts: the layer up to 0.23, a part of it since 0.24."""
    layer = wrapper.base_layer
    return getattr(layer, "routed_experts", layer)


def local_experts(wrapper: Any, name: str) -> tuple[int, ...]:
    """Global expert ids in slot order; all of them without expert parallelism.

    Under EPLB they are those of the start: redundant experts are the first ones again
    (0.33.0 eplb_state.py:301).

    The public `expert_map` is something else on ROCm (0.33.0 routed_experts.py:257). Raises
    PlacementError for a map whose slots have gaps, or for none under expert parallelism.
    """
    config = wrapper.base_layer.moe_config
    expert_map = getattr(routed_experts(wrapper), "_expert_map", None)
    if expert_map is None:
        if config.moe_parallel_config.use_ep and config.moe_parallel_config.ep_size > 1:
            raise PlacementError(f"{name}: expert parallelism without an expert map.")
        return tuple(range(int(config.num_experts)))
    # Shared experts that a backend fuses in follow the routed ones.
    rows = expert_map.tolist()[: int(config.num_experts)]
    slots = sorted((slot, expert) for expert, slot in enumerate(rows) if slot >= 0)
    if [slot for slot, _ in slots] != list(range(len(slots))):
        raise PlacementError(f"{name}: the local slots of its expert map are not 0, 1, 2, ...")
    num_logical = num_logical_experts(config)
    return tuple(expert % num_logical for _, expert in slots)


def interleaves(manager: Any) -> bool:
    """Whether gate and up rows alternate in the model's fused experts (gpt-oss).

    Like vLLM, by the architecture's name (0.33.0 lora/layers/fused_moe.py:553); and by the type of
    the text model, for models that contain one under another architecture.
    """
    config = getattr(manager.model, "config", None)
    text = getattr(config, "text_config", None) or config
    architectures = getattr(config, "architectures", None) or ()
    model_type = str(getattr(text, "model_type", "") or "")
    return "GptOssForCausalLM" in architectures or gate_up_of(model_type) == "interleaved"


def slot_bytes(manager: Any) -> int:
    """Host bytes of an adapter that fills one slot of every LoRA buffer of the engine."""
    slots = int(manager.lora_config.max_loras)
    total = 0
    for module in manager.modules.values():
        is_moe = type(module).__name__ in (WRAPPER_2D, WRAPPER_3D)
        # For a layer that tensor parallelism shards, the file has the whole factors.
        ranks = 1 if is_moe else int(getattr(module, "tp_size", 1) or 1)
        for name in _MOE_STACKS if is_moe else _DENSE_STACKS:
            for tensor in getattr(module, name, ()):
                total += tensor.numel() * tensor.element_size() * ranks // slots
    return total
