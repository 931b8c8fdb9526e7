"""One rank of real Megatron models on the CPU: python megatron_run.py RANK WORLD FOLDER CASES.

CASES: JSON, by name; see `Case`. Megatron-Core makes the model, Megatron-Bridge the adapters; what needs a GPU
stands in for itself: Transformer Engine and Triton are empty modules, and its grouped linear layers
are Megatron-Core's own linear layers with a number of experts. Saves the adapter by `save_megatron`,
and by Megatron-Bridge's own `save_hf_adapter`.
"""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
import types
import typing
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import typing_extensions
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from lorashard.errors import LorashardError

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, HEADS, GROUPS = 16, 12, 4, 4, 4, 2


@dataclass(frozen=True)
class Case:
    """A way to share a model, and a kind of LoRA.

    cp: only of the ranks, since attention that shares sequences needs Transformer Engine.
    experts: grouped or sequential. exports: whether `save_hf_adapter` can save it, too.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    vp: int = 1
    experts: str = "grouped"
    lora: str = "LoRA"
    exports: bool = True
    names: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def prepare_imports() -> None:
    """Make Megatron-Bridge's modules importable without a GPU, and without all of its models."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    import torch._inductor.runtime.triton_compat
    import torch._inductor.utils  # noqa: F401 - before it can find Triton

    for name in ("triton", "triton.language"):
        spec = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, MagicMock(__spec__=spec, __version__="3.0.0"))
    import megatron.core

    assert megatron.core.__file__ is not None
    folder = Path(megatron.core.__file__).parents[2]
    for name in ("megatron.bridge", "megatron.bridge.models", "megatron.bridge.models.qwen"):
        _stub(name, __path__=[str(folder.joinpath(*name.split(".")))])
    # Before they can find Transformer Engine.
    import megatron.core.models.gpt.gpt_model
    from megatron.bridge.peft import utils

    utils.HAVE_TE = False  # which asks only whether the names are there

    ops = types.SimpleNamespace(Sequential=object)
    _stub("transformer_engine", __path__=[], __version__="2.9.0")
    _stub("transformer_engine.pytorch", ops=ops)


def _stub(name: str, **members: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(sys.modules[name]).update(members)


def megatron_model(case: Case, chunk: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=GROUPS,
        kv_channels=4, ffn_hidden_size=INTERMEDIATE, moe_ffn_hidden_size=INTERMEDIATE,
        num_moe_experts=EXPERTS, moe_router_topk=2, moe_token_dispatcher_type="allgather",
        tensor_model_parallel_size=case.tp, pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp,
        virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
        gated_linear_unit=True, add_bias_linear=False,
        use_cpu_initialization=True, params_dtype=torch.float32, pipeline_dtype=torch.float32,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    model = GPTModel(
        config, spec, 32, 64,
        pre_process=parallel_state.is_pipeline_first_stage(False, chunk if case.vp > 1 else None),
        post_process=parallel_state.is_pipeline_last_stage(False, chunk if case.vp > 1 else None),
        vp_stage=chunk if case.vp > 1 else None,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    if case.experts == "grouped":
        for layer in model.decoder.layers:
            common: dict[str, Any] = {
                "config": config, "bias": False, "skip_bias_add": True, "is_expert": True,
                "init_method": config.init_method, "tp_group": parallel_state.get_expert_tensor_parallel_group(),
            }  # fmt: skip
            grouped = torch.nn.Module()
            grouped.linear_fc1 = ColumnParallelLinear(HIDDEN, 2 * INTERMEDIATE, **common)
            grouped.linear_fc2 = RowParallelLinear(
                INTERMEDIATE, HIDDEN, input_is_parallel=True, **common
            )
            for linear in (grouped.linear_fc1, grouped.linear_fc2):
                linear.num_gemms = EXPERTS // case.ep
            layer.mlp.experts = grouped
    return model


def fill(model: Any) -> None:
    """Give every tensor of the adapter values of its own; those that ranks share, the same."""
    from megatron.core import parallel_state

    for name, parameter in model.named_parameters():
        if ".adapter." not in name:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        number = model.decoder.layers[layer].layer_number
        owner = f"tp{parallel_state.get_tensor_model_parallel_rank()}"
        if ".experts." in name:
            is_shared = parameter.dim() == 2 and ".local_experts." not in name
            owner = "all" if is_shared else f"ep{parallel_state.get_expert_model_parallel_rank()}"
            owner += f"etp{parallel_state.get_expert_tensor_parallel_rank()}"
        seed = zlib.crc32(f"{number} {name.split(f'layers.{layer}.')[1]} {owner}".encode())
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data.copy_(values)


def renamed(bridge: Any, names: str) -> Any:
    """A registry that maps layers as those of other models do."""
    from megatron.bridge.models.conversion import param_mapping
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry

    attention = (
        "decoder.layers.*.self_attention.linear_qkv.weight",
        "model.layers.*.qkv_proj.weight",
    )
    experts = "decoder.layers.*.mlp.experts.linear_fc{}.weight*"
    others = {
        "packed": [
            param_mapping.FusedGatedExpertMapping(
                experts.format(1), "model.layers.*.mlp.experts.gate_up_proj"
            ),
            param_mapping.FusedExpertMapping(
                experts.format(2), "model.layers.*.mlp.experts.down_proj"
            ),
        ],
        "fused": [param_mapping.ConcatenatedQKVMapping(*attention)],
    }[names]
    replaced = {mapping.megatron_param for mapping in others}
    kept = [m for m in bridge.mapping_registry().mappings if m.megatron_param not in replaced]
    return MegatronMappingRegistry(*kept, *others)


def run(case: Case, folder: Path) -> None:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.qwen import qwen3_moe_bridge
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.core import parallel_state

    from lorashard.publish.megatron import save_megatron

    parallel_state.initialize_model_parallel(
        case.tp, case.pp, case.vp if case.vp > 1 else None, context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp,
    )  # fmt: skip
    kinds = {"LoRA": LoRA, "CanonicalLoRA": CanonicalLoRA}
    lora = kinds[case.lora](**({"dim": 4, "alpha": 8} | case.settings))
    models = [megatron_model(case, chunk) for chunk in range(case.vp)]
    lora(models if case.vp > 1 else models[0], training=True)
    for model in models:
        fill(model)
    base = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=4, vocab_size=32,
        num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=INTERMEDIATE,
    )  # fmt: skip
    bridge = AutoBridge.from_hf_config(base)
    if case.names:
        registry = renamed(bridge._model_bridge, case.names)
        changed = patch.object(
            qwen3_moe_bridge.Qwen3MoEBridge, "mapping_registry", lambda _: registry
        )
        changed.start()
    rank = dist.get_rank()
    if rank == 0:
        base.save_pretrained(folder / "base")
    told: dict[str, Any] = {}
    try:
        save_megatron(bridge, models, lora, folder / "sharded", ep_size=2)
    except LorashardError as err:
        told["error"] = f"{type(err).__name__}: {err}"
    else:
        if case.exports:
            bridge.save_hf_adapter(models, folder / "gathered", lora, show_progress=False)
    own = {
        name: parameter.detach()
        for name, parameter in models[-1].named_parameters()
        if ".adapter." in name
    }
    told["own"] = {name: list(tensor.shape) for name, tensor in own.items()}
    save_file(own, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(told))
    patch.stopall()
    dist.barrier()
    parallel_state.destroy_model_parallel()


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    prepare_imports()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    for name, case in json.loads(sys.argv[4]).items():
        (folder / name).mkdir(exist_ok=True)
        run(Case(**case), folder / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
