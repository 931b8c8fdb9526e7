"""vLLM's own LoRA manager on the CPU, around MoE layers that hold no weights.

Imported inside a process that has one release's vllm on its path (tests/vllm_release.py), never
by pytest itself. For releases 0.16.0 to 0.33.0; up to 0.20.2 stock refuses to wrap the layers of
more than one ep rank. What a release lacks or names otherwise is asked of it, not of its version.

Real: the manager's __init__, `create_lora_manager`, `_create_lora_modules`, `add_adapter` and all
below it; `FusedMoEWithLoRA` and `FusedMoE3DWithLoRA` from __init__ on; attention's linear layers
and their LoRA classes. Stand-ins are marked below: the platform, vllm_config and the model; and
the MoE layer, in moe_stand_in.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
import vllm.platforms
from torch import Tensor, nn

# Stand-in: a machine without a GPU is vLLM's "unspecified" platform, which names no punica
# wrapper and claims that memory can be pinned. Before the imports below, as they read it.
_PLATFORM = type(vllm.platforms.current_platform)
_PLATFORM.get_punica_wrapper = classmethod(
    lambda cls: "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
)
_PLATFORM.is_pin_memory_available = classmethod(lambda cls: False)

import vllm.lora.layers.fused_moe as lora_moe  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402
from vllm.config import CompilationConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.models.interfaces import SupportsLoRA  # noqa: E402
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402
from vllm.utils import platform_utils, torch_utils  # noqa: E402

from tests.vllm_plugin.moe_stand_in import (  # noqa: E402
    HAS_RUNNER,
    ROUTED_EXPERTS_KNOW_THE_MAPPING,
    MoEShape,
    Strategy,
    TritonExperts,
    expert_params_mapping,
    moe_stand_in,
)

__all__ = [
    "FusedMoE3DWithLoRA", "FusedMoEWithLoRA", "TritonExperts",
    "buffers", "deltas", "global_experts", "layers", "make_engine", "request", "slot_of",
]  # fmt: skip

# What vllm asked the platform before that, and handed on by name.
platform_utils.is_pin_memory_available.cache_clear()
for _name, _module in list(sys.modules.items()):
    if _name.startswith("vllm.") and hasattr(_module, "PIN_MEMORY"):
        _module.PIN_MEMORY = False
_copy = getattr(torch_utils, "async_tensor_h2d", None)
if _copy is not None and _copy.__defaults__ == (True,):  # 0.21 to 0.23: of its pin_memory
    _copy.__defaults__ = (False,)

Pair = tuple[Tensor, Tensor]  # lora_A, lora_B
Wrapper = Literal["2d", "3d"]


def make_engine(
    *,
    wrapper: Wrapper = "2d",
    gated: bool = True,
    num_experts: int = 8,
    ep_size: int = 2,
    ep_rank: int = 0,
    strategy: Strategy = "linear",
    hidden_size: int = 16,
    intermediate_size: int = 8,
    max_lora_rank: int = 8,
    max_loras: int = 2,
    max_cpu_loras: int = 2,
    module_names: Sequence[str] = ("model.layers.0.mlp.experts",),
    attention: bool = True,
    lora_dtype: torch.dtype = torch.bfloat16,
    fully_sharded: bool = False,
    mixed_format: bool = False,
    shared_loras: bool = False,
    architecture: str = "Glm4MoeForCausalLM",
    mapper: WeightsMapper | Mapping[str, Any] | None = None,
    attention_tp_size: int = 1,
    target_modules: list[str] | None = None,
    parallel: Mapping[str, Any] | None = None,
    own_kernel: bool = True,
    num_redundant: int = 0,
) -> LRUCacheWorkerLoRAManager:
    """A worker's LoRA manager whose `create_lora_manager` has run, on ep rank `ep_rank`.

    wrapper: "3d" makes a model with is_3d_moe_weight; it still gets the 2D layers with
    `mixed_format` or `shared_loras`. module_names: the MoE modules as vLLM names them; layers are
    placed beside them. mapper: the model's hf_to_vllm_mapper, or its fields. attention_tp_size:
    1, or ep_size as in a real engine (then attention's buffers hold one rank's part). With ep_size
    1 it is tensor parallelism alone: of the experts, too, and ep_rank is the rank in it. parallel:
    fields of vllm_config.parallel_config to add or change (data_parallel_size, enable_eplb).
    own_kernel: the quant method has its own kernel, as FP8's; False: LoRA has to make one of what
    the quant method selects, as for unquantized experts up to 0.19. num_redundant: of EPLB's redundant
    experts, beside the model's num_experts.
    Raises ValueError where the release has no such LoRA option, or no such quant methods.
    """
    flags = {
        "fully_sharded_loras": fully_sharded,
        "enable_mixed_moe_lora_format": mixed_format,
        "enable_moe_shared_loras": shared_loras,
    }
    options: dict[str, Any] = {name: True for name, on in flags.items() if on}
    if target_modules is not None:
        options["target_modules"] = target_modules
    lacking = options.keys() - {field.name for field in fields(LoRAConfig)}
    if lacking:
        raise ValueError(f"this vLLM has no LoRAConfig.{min(lacking)}")
    lora_config = LoRAConfig(
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        lora_dtype=lora_dtype,
        **options,
    )
    hf_config = PretrainedConfig(
        architectures=[architecture],
        max_position_embeddings=4096,
        hidden_size=hidden_size,
        vocab_size=64,
    )
    # Stand-in for VllmConfig: a real one wants a model's files and a device.
    parallel_config = SimpleNamespace(
        **{
            "enable_expert_parallel": ep_size > 1,
            "enable_eplb": False,
            "tensor_parallel_size": max(ep_size, attention_tp_size),
            "pipeline_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
            "data_parallel_rank": 0,
            "all2all_backend": "allgather_reducescatter",
            "expert_placement_strategy": strategy,
            "eplb_config": SimpleNamespace(num_redundant_experts=num_redundant),
        }
        | dict(parallel or {})
    )
    vllm_config = SimpleNamespace(
        lora_config=lora_config,
        parallel_config=parallel_config,
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
        compilation_config=CompilationConfig(custom_ops=["none"]),
        kernel_config=SimpleNamespace(linear_backend="auto", moe_backend="auto"),
        model_config=SimpleNamespace(
            model="stand-in",
            architectures=[architecture],
            hf_config=hf_config,
            hf_text_config=hf_config,
            dtype=torch.bfloat16,
            is_encoder_decoder=False,
            multimodal_config=None,
            get_vocab_size=lambda: 64,
        ),
    )
    tp_rank = ep_rank % attention_tp_size
    shape = MoEShape(
        gated=gated,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        ep_size=ep_size,
        ep_rank=ep_rank % ep_size,
        strategy=strategy,
        tp_size=attention_tp_size if ep_size == 1 else 1,
        tp_rank=tp_rank if ep_size == 1 else 0,
        num_redundant=num_redundant,
    )
    with set_current_vllm_config(vllm_config):
        model = _model(architecture, wrapper, gated, num_experts, hf_config, mapper)
        with _tensor_parallel(attention_tp_size, tp_rank):
            for name in module_names:
                _put(model, name, moe_stand_in(name, shape, parallel_config, own_kernel))
                if attention:
                    _put_attention(model, name.rpartition(".")[0].rpartition(".")[0], hidden_size)
            engine = LRUCacheWorkerLoRAManager(vllm_config, torch.device("cpu"), {})
            engine.create_lora_manager(model, vllm_config)
    return engine


def request(
    engine: LRUCacheWorkerLoRAManager,
    path: object,
    name: str = "a",
    lora_id: int = 1,
    is_3d: bool = False,
    load_inplace: bool = False,
) -> LoRARequest:
    """This release's LoRARequest; give it to `engine.add_adapter`."""
    options = {"is_3d_lora_weight": is_3d, "load_inplace": load_inplace}
    known = {key: value for key, value in options.items() if key in LoRARequest.__struct_fields__}
    assert all(key in known for key, value in options.items() if value), "not in this release"
    return LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=str(path), **known)


def slot_of(engine: LRUCacheWorkerLoRAManager, lora_id: int = 1) -> int:
    """The slot that an active adapter is in; ValueError if it is not active."""
    return engine._adapter_manager.lora_index_to_id.index(lora_id)


def layers(engine: LRUCacheWorkerLoRAManager) -> dict[str, Any]:
    """The LoRA layers, MoE and attention, by vLLM's module name."""
    return dict(engine._adapter_manager.modules)


def global_experts(layer: Any) -> list[int]:
    """Global expert ids in slot order, from the layer's own `_expert_map`."""
    holder = layer.base_layer.routed_experts if HAS_RUNNER else layer.base_layer
    num_local = holder.local_num_experts
    if holder._expert_map is None:
        return list(range(num_local))
    owner = {slot: e for e, slot in enumerate(holder._expert_map.tolist()) if slot >= 0}
    return [owner[slot] for slot in range(num_local)]


def buffers(engine: LRUCacheWorkerLoRAManager, slot: int) -> dict[str, dict[str, Pair]]:
    """Copies of one slot of the stacked buffers: {module: {projection: (lora_A, lora_B)}}.

    Experts: [E_local, r, in] and [E_local, out, r] under gate_proj, up_proj and down_proj;
    gate_up_proj for the 3D layers, no gate_proj without a gate, and 1 for E_local where
    shared_loras shares. Attention: [r, in] and [out, r]. r is max_lora_rank, padded with zeros.
    """
    found: dict[str, dict[str, Pair]] = {}
    for name, layer in layers(engine).items():
        if isinstance(layer, FusedMoEWithLoRA):
            stacks = _expert_stacks(layer)
            found[name] = {p: (a[slot].clone(), b[slot].clone()) for p, (a, b) in stacks.items()}
        else:
            leaf = name.rpartition(".")[2]
            parts = type(engine._adapter_manager.model).packed_modules_mapping.get(leaf, [leaf])
            found[name] = {
                part: (a[slot, 0].clone(), b[slot, 0].clone())
                for part, a, b in zip(
                    parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True
                )
            }
    return found


def are_equal(one: dict[str, dict[str, Pair]], other: dict[str, dict[str, Pair]]) -> bool:
    """Whether all of one slot, as `buffers` copies it, is in another."""
    return all(
        torch.equal(a, b)
        for module, projections in one.items()
        for projection, pair in projections.items()
        for a, b in zip(pair, other[module][projection], strict=True)
    )


def deltas(engine: LRUCacheWorkerLoRAManager, slot: int) -> dict[str, dict[int, dict[str, Tensor]]]:
    """{module: {global expert: {projection: lora_B @ lora_A}}} in float32, MoE modules only.

    The scaling is in lora_B by then. 3D layers' gate_up_proj comes as gate_proj and up_proj.
    """
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    in_slot = buffers(engine, slot)
    interleaved = "GptOssForCausalLM" in engine._adapter_manager.model.config.architectures
    for name, layer in layers(engine).items():
        if not isinstance(layer, FusedMoEWithLoRA):
            continue
        experts = global_experts(layer)
        found[name] = {expert: {} for expert in experts}
        for projection, (a, b) in in_slot[name].items():
            lora_a, lora_b = (t.float().expand(len(experts), -1, -1) for t in (a, b))
            for expert, delta in zip(experts, lora_b @ lora_a, strict=True):
                if projection != "gate_up_proj":
                    found[name][expert][projection] = delta
                    continue
                half = delta.shape[0] // 2
                gate, up = (
                    (delta[0::2], delta[1::2]) if interleaved else (delta[:half], delta[half:])
                )
                found[name][expert] |= {"gate_proj": gate, "up_proj": up}
    return found


def _expert_stacks(layer: Any) -> dict[str, Pair]:
    w13 = list(zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True))
    w2 = (layer.w2_lora_a_stacked[0], layer.w2_lora_b_stacked[0])
    if isinstance(layer, FusedMoE3DWithLoRA):
        names = ["gate_up_proj"]
    else:
        # Without a gate, w1 is the up projection and there is no w3 (nemotron_h.py).
        names = ["gate_proj", "up_proj"] if len(w13) == 2 else ["up_proj"]
    return dict(zip(names, w13, strict=True)) | {"down_proj": w2}


def _model(
    architecture: str,
    wrapper: Wrapper,
    gated: bool,
    num_experts: int,
    hf_config: PretrainedConfig,
    mapper: WeightsMapper | Mapping[str, Any] | None,
) -> Any:
    """Stand-in: a model with nothing in it yet, and what a model class tells the LoRA manager."""
    members: dict[str, Any] = {
        "is_3d_moe_weight": wrapper == "3d",
        "is_non_gated_moe": not gated,
        "packed_modules_mapping": {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        },
        "embedding_modules": {},
        "embed_input_ids": lambda self, input_ids: None,  # else 0.33 warns that it is missing
    }
    if mapper is not None:
        given = mapper if isinstance(mapper, WeightsMapper) else WeightsMapper(**mapper)
        members["hf_to_vllm_mapper"] = given
    if not ROUTED_EXPERTS_KNOW_THE_MAPPING:

        def get_expert_mapping(self: nn.Module) -> list[tuple[str, str, int, str]]:
            return expert_params_mapping(self, gated, num_experts)

        members["get_expert_mapping"] = get_expert_mapping
    model = type(architecture, (nn.Module, SupportsLoRA), members)()
    model.config = hf_config
    return model


def _put_attention(model: nn.Module, block: str, hidden_size: int) -> None:
    """Four heads, two for keys and values; real layers."""
    head = hidden_size // 4
    where = f"{block}.self_attn" if block else "self_attn"
    quiet = {"bias": False, "params_dtype": torch.bfloat16}
    qkv = linear.QKVParallelLinear(hidden_size, head, 4, 2, prefix=f"{where}.qkv_proj", **quiet)
    out = linear.RowParallelLinear(4 * head, hidden_size, prefix=f"{where}.o_proj", **quiet)
    _put(model, f"{where}.qkv_proj", qkv)
    _put(model, f"{where}.o_proj", out)


def put_dense_mlp(model: nn.Module, block: str, hidden_size: int, inner_size: int) -> None:
    """Shared experts and their gate beside the experts; real layers. See `_put_attention`."""
    quiet = {"bias": False, "params_dtype": torch.bfloat16}
    both, shared = [inner_size, inner_size], f"{block}.mlp.shared_experts"
    _put(
        model,
        f"{shared}.gate_up_proj",
        linear.MergedColumnParallelLinear(hidden_size, both, **quiet),
    )
    _put(model, f"{shared}.down_proj", linear.RowParallelLinear(inner_size, hidden_size, **quiet))
    _put(model, f"{block}.mlp.shared_expert_gate", linear.ReplicatedLinear(hidden_size, 3, **quiet))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    at = model
    for parent in parents:
        if parent not in at._modules:
            at.add_module(parent, nn.Module())
        at = at._modules[parent]
    at.add_module(leaf, module)


@contextmanager
def _tensor_parallel(tp_size: int, tp_rank: int) -> Iterator[None]:
    """Stand-in for the process group, which linear layers ask for their size and rank."""
    with ExitStack() as stack:
        for module in (linear, parameter, lora_moe):
            if hasattr(module, "get_tensor_model_parallel_rank"):
                stack.enter_context(
                    mock.patch.multiple(
                        module,
                        get_tensor_model_parallel_world_size=lambda: tp_size,
                        get_tensor_model_parallel_rank=lambda: tp_rank,
                    )
                )
        yield
