"""The MoE layer of harness.py: vLLM's own class without its __init__, on the CPU, without weights.

Real: `FusedMoEConfig`, `determine_expert_map` or `ExpertMapManager`, the modular kernel and
`TritonExperts`, the layer's methods and properties. Stand-ins: the layer's __init__ (router,
weights, process groups), its runner, and its quant method. Imported by harness.py, which first
makes the platform one that LoRA can start on.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
import vllm.lora.utils as lora_utils
import vllm.platforms
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import config as moe_configs
from vllm.model_executor.layers.fused_moe import layer as moe_layer
from vllm.model_executor.layers.fused_moe import modular_kernel, prepare_finalize
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

try:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
except ImportError:  # up to 0.20
    from vllm.model_executor.layers.fused_moe.fused_moe import TritonExperts

try:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
except ImportError:  # 0.16, which names activations by strings
    MoEActivation = str

if hasattr(modular_kernel, "FusedMoEKernel"):
    ModularKernel = modular_kernel.FusedMoEKernel
    PrepareAndFinalize = prepare_finalize.MoEPrepareAndFinalizeNoDPEPModular
else:  # 0.16
    ModularKernel = modular_kernel.FusedMoEModularKernel
    PrepareAndFinalize = prepare_finalize.MoEPrepareAndFinalizeNoEP

# What the LoRA manager wraps: MoERunner holds RoutedExperts (>= 0.24), FusedMoE is both before.
HAS_RUNNER = hasattr(lora_utils, "MoERunner")
MOE_CLASS = lora_utils.MoERunner if HAS_RUNNER else lora_utils.FusedMoE
if HAS_RUNNER:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    ROUTED_EXPERTS_KNOW_THE_MAPPING = hasattr(RoutedExperts, "get_expert_mapping")
else:
    ROUTED_EXPERTS_KNOW_THE_MAPPING = False

Strategy = Literal["linear", "round_robin"]


@dataclass(frozen=True)
class MoEShape:
    """What one rank's MoE layers are made for; with ep_size 1, ep_rank is 0."""

    gated: bool
    num_experts: int
    hidden_size: int
    intermediate_size: int
    ep_size: int
    ep_rank: int
    strategy: Strategy
    tp_size: int = 1  # with expert parallelism always 1: it takes the tensor-parallel ranks
    tp_rank: int = 0
    num_redundant: int = 0  # of EPLB's redundant experts, beside num_experts

    @property
    def num_physical(self) -> int:
        """With the redundant ones."""
        return self.num_experts + self.num_redundant


def moe_stand_in(name: str, shape: MoEShape, parallel_config: Any, own_kernel: bool) -> nn.Module:
    """An MoE layer with the attributes that LoRA reads."""
    moe_config = _moe_config(shape, parallel_config)
    layer = _bare(MOE_CLASS)
    holder = layer
    if HAS_RUNNER:
        holder = _bare(RoutedExperts)
        layer.routed_experts = holder
        layer._shared_experts = None
        layer.moe_config = moe_config
        layer.layer_name = name
    else:
        runner = SimpleNamespace(_replace_quant_method=lambda method: None)
        layer.runner = runner
        layer._init_runner = lambda: runner  # 0.17 to 0.19 make a new one for each quant method
    _place_experts(holder, moe_config, shape.strategy, shape.num_redundant)
    holder.w13_weight = nn.Parameter(torch.empty(0), requires_grad=False)
    holder.w2_weight = nn.Parameter(torch.empty(0), requires_grad=False)
    for key, value in {
        "layer_name": name,
        "moe_config": moe_config,
        "moe_parallel_config": moe_config.moe_parallel_config,
        "quant_method": _QuantMethod(moe_config, own_kernel),
        "top_k": moe_config.experts_per_token,
        "global_num_experts": shape.num_physical,
        "logical_num_experts": shape.num_experts,
        "hidden_size": shape.hidden_size,
        "intermediate_size_per_partition": moe_config.intermediate_size_per_partition,
        "ckpt_gate_proj_name": "gate_proj" if shape.gated else "up_proj",
        "ckpt_down_proj_name": "down_proj",
        "ckpt_up_proj_name": "up_proj" if shape.gated else _no_projection(),
        "lora_base_layer_prefix": "",
    }.items():
        if not isinstance(getattr(type(holder), key, None), property):
            setattr(holder, key, value)
    return layer


def expert_params_mapping(
    model: nn.Module, gated: bool, num_experts: int
) -> list[tuple[str, str, int, str]]:
    """What a model class of this release returns from `get_expert_mapping`."""
    return _make_mapping()(
        model,
        ckpt_gate_proj_name="gate_proj" if gated else "up_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj" if gated else _no_projection(),
        num_experts=num_experts,
    )


def _make_mapping() -> Any:
    if hasattr(moe_layer, "fused_moe_make_expert_params_mapping"):
        return moe_layer.fused_moe_make_expert_params_mapping
    return MOE_CLASS.make_expert_params_mapping


def _no_projection() -> str | None:
    """How this release's models say that their experts have no w3: None later, "" before."""
    parameters = inspect.signature(_make_mapping()).parameters
    return "" if parameters["ckpt_up_proj_name"].annotation is str else None


def _moe_config(shape: MoEShape, parallel_config: Any) -> Any:
    """The real FusedMoEConfig that an engine gives its MoE layers."""
    parallel = _build(
        moe_configs.FusedMoEParallelConfig,
        {
            "tp_size": shape.tp_size,
            "tp_rank": shape.tp_rank,
            "pcp_size": 1,
            "pcp_rank": 0,
            "dp_size": parallel_config.data_parallel_size,
            "dp_rank": parallel_config.data_parallel_rank,
            "ep_size": shape.ep_size,
            "ep_rank": shape.ep_rank,
            "sp_size": 1,
            "is_sequence_parallel": False,  # 0.16; a property of sp_size later
            "use_ep": shape.ep_size > 1,
            "all2all_backend": parallel_config.all2all_backend,
            "enable_eplb": parallel_config.enable_eplb,
        },
    )
    even, remainder = divmod(shape.num_physical, shape.ep_size)
    values = {
        "num_experts": shape.num_physical,
        "experts_per_token": min(2, shape.num_experts),
        "hidden_dim": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "intermediate_size_per_partition": shape.intermediate_size // shape.tp_size,
        "num_local_experts": even + (shape.ep_rank < remainder),
        "num_logical_experts": shape.num_experts,
        "activation": MoEActivation("silu" if shape.gated else "relu2_no_mul"),
        "device": "cpu",
        "routing_method": moe_configs.RoutingMethodType.Renormalize,
        "moe_parallel_config": parallel,
        "in_dtype": torch.bfloat16,
        "is_lora_enabled": True,
        "is_act_and_mul": shape.gated,  # a property of the activation later
    }
    # FusedMoEConfig refuses experts without a gate on other platforms than CUDA.
    platform = type(vllm.platforms.current_platform)
    with mock.patch.object(platform, "is_cuda_alike", return_value=True):
        return _build(moe_configs.FusedMoEConfig, values)


class _QuantMethod(FusedMoEMethodBase):
    """Stand-in for quant methods, which pick their kernel by the device.

    own_kernel: as FP8 in every release and all of them in the later ones; else as unquantized
    experts up to 0.19, whose kernel LoRA makes itself.
    """

    def __init__(self, moe_config: Any, own_kernel: bool) -> None:
        super().__init__(moe_config)
        self.moe_quant_config = moe_configs.FUSED_MOE_UNQUANTIZED_CONFIG
        self.own_kernel = own_kernel
        # Real kernel classes, as TP + EP with data_parallel_size 1 uses them; never run here.
        if own_kernel:
            kernel = ModularKernel(PrepareAndFinalize(), self._experts())
            setattr(self, "moe_mk" if hasattr(self, "moe_mk") else "moe_kernel", kernel)
        elif not hasattr(FusedMoEMethodBase, "select_gemm_impl"):
            raise ValueError("in this vLLM every quant method has its own kernel")

    def _experts(self) -> TritonExperts:
        return TritonExperts(self.moe, self.moe_quant_config)

    def select_gemm_impl(self, prepare_finalize: Any, layer: nn.Module) -> TritonExperts:
        if self.own_kernel:
            raise ValueError(
                f"{type(self).__name__} uses the new modular kernel initialization logic. "
                "This function should not be called."
            )
        return self._experts()

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: nn.Module) -> Any:
        return self.moe_quant_config

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


def _place_experts(holder: Any, moe_config: Any, strategy: Strategy, num_redundant: int) -> None:
    """Sets `local_num_experts` and `_expert_map`, as the layer's __init__ does."""
    if hasattr(type(holder), "update_expert_map_info"):
        holder.expert_map_manager = _expert_map_manager(moe_config, strategy, num_redundant)
        holder.update_expert_map_info()
    else:  # up to 0.21
        parallel = moe_config.moe_parallel_config
        holder.local_num_experts, expert_map, _ = moe_layer.determine_expert_map(
            parallel.ep_size, parallel.ep_rank, moe_config.num_experts, strategy
        )
        holder.register_buffer("_expert_map", expert_map)
        holder.expert_placement_strategy = strategy
    assert holder.local_num_experts == moe_config.num_local_experts


def _expert_map_manager(moe_config: Any, strategy: Strategy, num_redundant: int) -> Any:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    return ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=moe_config.experts_per_token,
        global_num_experts=moe_config.num_experts,
        num_redundant_experts=num_redundant,
        # vLLM keeps round_robin only for models with expert groups, and falls back to linear.
        num_expert_group=2 if strategy == "round_robin" else None,
        moe_parallel_config=moe_config.moe_parallel_config,
        placement_strategy=strategy,
        enable_eplb=moe_config.moe_parallel_config.enable_eplb,
    )


def _bare(cls: type[nn.Module]) -> Any:
    instance = nn.Module.__new__(cls)
    nn.Module.__init__(instance)
    return instance


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from those of `values` that this release has."""
    known = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in values.items() if key in known})
