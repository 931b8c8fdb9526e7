"""Run inside a vLLM release: MoE layers with LoRA under expert parallelism, without weights.

Which kernel a layer keeps, how it is sharded, its warm-up, what LoRA is given to read, and what is
asked of the CUDA op that sorts tokens. Each function returns what went wrong, as lines;
test_layers_conformance.py calls them.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lorashard.vllm_plugin import register

register()

from lorashard.vllm_plugin.engine import facts  # noqa: E402
from lorashard.vllm_plugin.patches import expert_parallel  # noqa: E402
from lorashard.vllm_plugin.patches.apply import outcomes  # noqa: E402
from tests.vllm_plugin import harness, moe_stand_in  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import (  # noqa: E402
    SIZES,
    adapter_of,
    mismatches,
    modules,
)
from tests.vllm_plugin.loading import expected_of  # noqa: E402

Engine = Any
# The kinds of MoE layer, and an expert count that leaves a rank of two without experts.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"wrapper": "3d"},
    {"gated": False},
    {"num_experts": 1},
    {"num_experts": 1, "wrapper": "3d"},
    {"num_experts": 1, "gated": False},
    {"num_experts": 7},
    {"num_experts": 7, "strategy": "round_robin"},
)


def ranks(ep_size: int = 2, **options: Any) -> Iterator[Engine]:
    for ep_rank in range(ep_size):
        yield harness.make_engine(
            **SIZES | options, ep_size=ep_size, ep_rank=ep_rank, module_names=modules()
        )


def moe_layers(engine: Engine) -> list[Any]:
    return [layer for layer in harness.layers(engine).values() if hasattr(layer, "_w13_slices")]


def method_of(layer: Any) -> Any:
    """The layer's quant method as LoRA has replaced it."""
    base = layer.base_layer
    return base._quant_method if harness.HAS_RUNNER else base.quant_method


def kernel_of(method: Any) -> Any:
    """What each release calls the modular kernel of a quant method."""
    return getattr(method, "moe_kernel", None) or getattr(method, "moe_mk", None)


def selects_its_kernel() -> list[str]:
    """The method's own kernel where it has one, else one around what it selects; never cut."""
    wrong = []
    for own_kernel, ep_size in itertools.product((True, False), (1, 2)):
        try:
            engines = list(ranks(ep_size, own_kernel=own_kernel, attention_tp_size=ep_size))
        except ValueError:
            if own_kernel:
                raise
            continue  # a release in which every method has its own
        for layer in itertools.chain.from_iterable(map(moe_layers, engines)):
            found = _kernel_problems(layer, own_kernel, ep_size)
            wrong += [f"own kernel {own_kernel}, ep size {ep_size}: {line}" for line in found]
    return wrong


def _kernel_problems(layer: Any, own_kernel: bool, ep_size: int) -> Iterator[str]:
    method = method_of(layer)
    kernel = kernel_of(method)
    if type(method).__name__ != "FusedMoEModularMethod":
        yield type(method).__name__
    if own_kernel and kernel is not kernel_of(method.old_quant_method):
        yield "not the method's own kernel"
    inside = getattr(kernel, "impl", kernel)
    if type(inside.prepare_finalize) is not moe_stand_in.PrepareAndFinalize:
        yield type(inside.prepare_finalize).__name__
    if facts._experts_object(layer) is not inside.fused_experts:
        yield "the experts are not found"
    if (layer.tp_size, layer.tp_rank) != (1, 0):
        yield f"tp {layer.tp_rank} of {layer.tp_size}"
    parallel = layer.base_layer.moe_config.moe_parallel_config
    if getattr(layer.base_layer, "moe_parallel_config", parallel) is not parallel:
        yield "the layer's parallel config was changed"
    if parallel.use_ep != (ep_size > 1):
        yield f"{parallel.use_ep=}"


def cuts_for_tensor_parallelism() -> list[str]:
    """Without expert parallelism a layer is cut by tensor-parallel rank, as ever."""
    wrong = []
    for tp_rank in range(2):
        engine = harness.make_engine(
            **SIZES | {"intermediate_size": 8}, ep_size=1, attention_tp_size=2, ep_rank=tp_rank,
            module_names=modules(),
        )  # fmt: skip
        for layer in moe_layers(engine):
            if (layer.tp_size, layer.tp_rank) != (2, tp_rank):
                wrong.append(f"tp {layer.tp_rank} of {layer.tp_size}, not {tp_rank} of 2")
    return wrong


def warms_up() -> list[str]:
    """Dummy adapters of the warm-up, on every kind of layer and on ranks without experts."""
    wrong = []
    for kind, slots in itertools.product(KINDS, (1, 4)):
        for engine in ranks(**kind, max_loras=slots, max_cpu_loras=slots):
            where = f"{kind} slots {slots} of {len(moe_layers(engine))} layers"
            for lora_id in range(1, slots + 1):
                dummy = harness.request(engine, "/nowhere", f"dummy{lora_id}", lora_id)
                with engine.dummy_lora_cache():
                    engine.add_dummy_lora(dummy, 8)
                engine._adapter_manager.activate_adapter(lora_id)
                for layer in moe_layers(engine):
                    slot = harness.slot_of(engine, lora_id)
                    if not int(layer.adapter_enabled[slot]):
                        wrong.append(f"{where}: slot {slot} is not enabled")
            if "_match_target_modules" in vars(engine._adapter_manager):
                wrong.append(f"{where}: the manager was left changed")
            engine._adapter_manager.remove_all_adapters()
    return wrong


def loads_on_ranks_without_experts() -> list[str]:
    """One expert for three ranks: the first has it, the others load all the same."""
    wrong = []
    for wrapper, layout in (("2d", "L1"), ("3d", "L2")):
        built = adapter_of(layout, num_experts=1)
        path = built.write(Path(tempfile.mkdtemp()))
        for engine in ranks(3, wrapper=wrapper, num_experts=1):
            engine.add_adapter(harness.request(engine, path))
            found = mismatches(engine, harness.slot_of(engine), expected_of(built))
            wrong += [f"{layout} on {wrapper}: {line}" for line in found]
    return wrong


def refuses_data_parallel_dispatch() -> list[str]:
    """With several data-parallel ranks no such kernel is right; there vLLM's assertion stays."""
    layer_class = harness.lora_moe.FusedMoEWithLoRA
    if not expert_parallel.refuses_expert_parallelism(layer_class):
        return []
    os.environ["LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL"] = "1"
    try:
        harness.make_engine(**SIZES, parallel={"data_parallel_size": 2})
    except AssertionError as err:
        return [] if "EP support" in str(err) else [str(err)]
    finally:
        del os.environ["LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL"]
    return ["it started"]


def rearranged_weights() -> list[str]:
    """A layer whose weights another kernel laid out is found, one with Triton's is not."""
    if harness.HAS_RUNNER:
        return []  # since 0.20 vLLM lays weights out for Triton as soon as LoRA is enabled
    wrong = []
    try:
        engine = next(ranks(own_kernel=False))
    except ValueError:
        return []
    (layer, *_) = moe_layers(engine)
    method = method_of(layer).old_quant_method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    for backend in UnquantizedMoeBackend:
        method.unquantized_backend = backend
        found = facts._rearranged_for(layer)
        if (found is None) != (backend.name == "TRITON"):
            wrong.append(f"{backend}: {found}")
    return wrong


_KEEPS_INPUT = (
    "vllm.model_executor.layers.fused_moe.fused_moe_modular_method.FusedMoEModularMethod.apply"
)


class _Recorder:
    """Stand-in for the punica wrapper: keeps the inputs that LoRA on the experts is given."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def add_lora_w13(self, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(x)
        return None, None, None, None

    def add_lora_fused_moe(self, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.inputs.append(x)

    def moe_lora_align_block_size(self, *args: Any, **kwargs: Any) -> Any:
        return None, None, None, None


def lora_reads_what_the_layer_was_given() -> list[str]:
    """With FP8 experts LoRA gets the layer's input, with bf16 what the kernel made of it.

    From 0.24.0 on vLLM's experts see to it themselves, inside their GEMMs.
    """
    if outcomes[_KEEPS_INPUT].state == "not needed" and harness.HAS_RUNNER:
        return []
    wrong = []
    for dtype, weighted in itertools.product((torch.float8_e4m3fn, None), (False, True)):
        x = torch.randn(3, SIZES["hidden_size"], dtype=torch.bfloat16)
        weights = torch.rand(3, 1)
        (layer, *_) = moe_layers(next(ranks()))
        recorder = _Recorder()
        _run_layer(layer, recorder, x, weights, dtype, weighted)
        if len(recorder.inputs) != 1:
            wrong.append(f"{dtype}: {len(recorder.inputs)} inputs")
            continue
        (found,) = recorder.inputs
        wanted = x * weights.to(x.dtype) if weighted else x
        if weighted and outcomes[_KEEPS_INPUT].state != "applied":
            continue  # what releases that we leave alone do with such a model
        if found.dtype != x.dtype or not torch.equal(found, wanted):
            wrong.append(f"{dtype} {weighted=}: {found.dtype}")
        context = getattr(facts._experts_object(layer), "_lora_context", None)
        kept = getattr(context, "original_hidden_states", None)
        if kept is not None:
            wrong.append(f"{dtype} {weighted=}: the input is kept after the call")
    return wrong


def _run_layer(
    layer: Any,
    recorder: _Recorder,
    x: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype | None,
    weighted: bool,
) -> None:
    """The layer's own apply, through the real modular kernel; the experts only ask for LoRA."""
    method = method_of(layer)
    kernel = kernel_of(method)
    inside = getattr(kernel, "impl", kernel)
    experts = inside.fused_experts
    prepare = inside.prepare_finalize.prepare

    def prepared(a1: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        a1q, *rest = prepare(a1, *args, **kwargs)
        return (a1q if dtype is None else a1q.to(dtype), *rest)

    layer.set_mapping(recorder)
    config = SimpleNamespace(quant_dtype=dtype)
    routed = getattr(layer.base_layer, "routed_experts", layer.base_layer)
    with mock.patch.multiple(routed, create=True, apply_router_weight_on_input=weighted,
                             activation="silu", rocm_aiter_fmoe_enabled=False), \
         mock.patch.object(inside.prepare_finalize, "prepare", prepared), \
         mock.patch.object(inside, "_fused_experts", _asks_for_lora(layer, experts)), \
         mock.patch.object(inside, "_finalize", lambda output, *a, **k: output), \
         mock.patch.object(method, "moe_quant_config", config, create=True):  # fmt: skip
        original = getattr(method.apply, "__wrapped__", method.apply)
        shared = [n for n in inspect.signature(original).parameters if n.startswith("shared_")]
        method.apply(
            layer=routed, x=x, topk_weights=weights, topk_ids=torch.zeros(3, 1).int(),
            **dict.fromkeys(shared),
        )  # fmt: skip


def _asks_for_lora(layer: Any, experts: Any) -> Callable[..., Any]:
    """Stands for the experts' GEMMs: the steps at which LoRA comes in, with what they get."""

    def fused_experts(*args: Any, a1q: torch.Tensor, topk_ids: Any, **kwargs: Any) -> Any:
        rows = len(a1q) * layer.base_layer.moe_config.experts_per_token
        wide = torch.zeros(rows, 2 * SIZES["intermediate_size"], dtype=torch.bfloat16)
        if hasattr(experts, "apply_w13_lora"):
            experts.apply_w13_lora(
                experts._lora_context, y=wide, x=a1q, topk_ids=topk_ids, topk_weights=None,
                expert_map=None, w1=None, w2=None, num_tokens=len(a1q), top_k_num=1,
            )  # fmt: skip
        else:  # to 0.19 LoRA stands around the activation
            activation = moe_stand_in.MoEActivation("silu")
            with (
                mock.patch.object(layer, "_get_lora_moe_configs", _block_sizes),
                contextlib.suppress(AttributeError),  # then comes vLLM's own CUDA op
            ):
                experts.activation(activation, wide[:, ::2].clone(), wide)
        return a1q

    return fused_experts


def _block_sizes(*args: Any, **kwargs: Any) -> Any:
    return {"BLOCK_SIZE_M": 16}, {"BLOCK_SIZE_M": 16}


def asks_the_op_for_global_experts() -> list[str]:
    """With an expert map the CUDA op counts all experts, gets the map and writes over -1."""
    from vllm.lora.punica_wrapper import punica_gpu

    calls: list[tuple[Any, ...]] = []
    wrapper = _gpu_wrapper(punica_gpu.PunicaWrapperGPU)
    placed = torch.tensor([-1, 0, -1, 1, -1, -1, 2, 3], dtype=torch.int32)
    topk_ids = torch.tensor([[0, 6], [7, 2], [3, 1]], dtype=torch.int32)
    op = mock.patch.object(
        punica_gpu.ops, "moe_lora_align_block_size", lambda *args: calls.append(args)
    )
    with op:
        for expert_map in (placed, None):
            answer = wrapper.moe_lora_align_block_size(
                topk_ids, 3, 16, 4, 2, torch.ones(3, dtype=torch.int32), expert_map
            )
            calls[-1] += answer
    with_map, without = calls
    wrong = []
    if with_map[2] != 8 or with_map[12] is not placed:
        wrong.append(f"{with_map[2]} experts, map {with_map[12]}")
    if not bool((with_map[8] == -1).all()):
        wrong.append("expert ids do not start as -1")
    if without[2] != 4:
        wrong.append(f"without a map: {without[2]} experts")
    tokens, blocks = with_map[5], with_map[6]
    if with_map[7].shape != (2 * tokens,) or with_map[8].shape != (2 * blocks,):
        wrong.append(f"room for {with_map[7].shape} ids in {with_map[8].shape} blocks")
    if tokens < min(6 * 16, 6 + 8 * 15) or blocks * 16 < tokens:
        wrong.append(f"{tokens} ids in {blocks} blocks")
    return wrong


def adds_nothing_where_there_is_nothing() -> list[str]:
    """A batch without LoRA, or a rank without experts, runs no LoRA kernel on the experts."""
    from vllm.lora.punica_wrapper import punica_gpu

    wrapper = _gpu_wrapper(punica_gpu.PunicaWrapperGPU)
    ran: list[Any] = []
    wrong = []
    with mock.patch.object(
        punica_gpu, "fused_moe_lora", lambda *a, **k: ran.append(a), create=True
    ):
        for ids, num_experts, expected in (
            ([0, -1, 1], 3, 1), ([-1, -1, -1], 3, 0), ([0, -1, 1], 0, 0),
        ):  # fmt: skip
            ran.clear()
            tokens = torch.tensor(ids)
            wrapper.token_mapping_meta.prepare_tensors(tokens.int())
            y = torch.zeros(3, 2, 4)
            wrapper.add_lora_fused_moe(
                y, torch.zeros(3, 4), (torch.zeros(2, num_experts, 8, 4),),
                (torch.zeros(2, num_experts, 4, 8),), torch.zeros(3, 2), None, torch.zeros(6), None,
                8, 2, {}, {}, torch.ones(3),
            )  # fmt: skip
            if len(ran) != expected:
                wrong.append(f"{ids}, {num_experts} experts: {len(ran)} kernels")
    return wrong


def _gpu_wrapper(cls: type) -> Any:
    """The release's wrapper for GPUs, on the CPU."""
    from vllm.lora.ops.triton_ops import lora_kernel_metadata as metadata
    from vllm.lora.punica_wrapper import punica_gpu

    # Without Triton the module leaves these out.
    punica_gpu.LoRAKernelMeta = metadata.LoRAKernelMeta
    punica_gpu.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    config = SimpleNamespace(max_loras=2, specialize_active_lora=False, fully_sharded_loras=False)
    return cls(16, 4, "cpu", lora_config=config)


def patch_states() -> dict[str, str]:
    """Every patch's state, once its module is imported."""
    import importlib
    import importlib.util

    from lorashard.vllm_plugin.patches.table import PATCHES

    for patch in PATCHES:
        try:
            if importlib.util.find_spec(patch.module) is not None:
                importlib.import_module(patch.module)
        except ModuleNotFoundError:
            continue
    return {
        patch.target: outcomes[patch.target].state if patch.target in outcomes else "no such module"
        for patch in PATCHES
    }


CHECKS: tuple[Callable[[], Any], ...] = (
    selects_its_kernel, cuts_for_tensor_parallelism, warms_up, loads_on_ranks_without_experts,
    refuses_data_parallel_dispatch, rearranged_weights, lora_reads_what_the_layer_was_given,
    asks_the_op_for_global_experts, adds_nothing_where_there_is_nothing, patch_states,
)  # fmt: skip


def run_all() -> dict[str, Any]:
    """Every check's findings; what a check raises is its finding."""
    found: dict[str, Any] = {}
    for check in CHECKS:
        try:
            found[check.__name__] = check()
        except Exception:  # noqa: BLE001 - told with the rest
            found[check.__name__] = [traceback.format_exc()[-2000:]]
    return found
