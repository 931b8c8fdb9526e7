"""Filled tensors -> vLLM's own LoRAModel.

Tensors of attention and dense layers go through vLLM's `from_lora_tensors`. The experts' are put
under the wrapper's name as the lists that `set_lora` takes, which vLLM's packing leaves alone
(0.33.0 lora/model_manager.py:849; held in tests/vllm_plugin/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.keys import LoraKey, parse_key
from lorashard.dtypes import FROM_TORCH, TORCH_DTYPES
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from lorashard.vllm_options import smallest_max_lora_rank
from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.engine.names import ModuleNames
from lorashard.vllm_plugin.load.assembly import Assembly

_MARK = "_lorashard_ready"  # an attribute of weights that vLLM may have as they are
_DUMMY = "dummy"
_MAPS = "_lorashard_maps"  # an attribute of vLLM's LoRAModel
# The arguments of `from_local_checkpoint` that `from_lora_tensors` has too. The others say how to
# read and slice files (tensorizer_config_dict, moe_ep_spec), which has been done by then.
_SHARED_ARGUMENTS = (
    "lora_model_id", "device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes",
)  # fmt: skip


def make_lora_model(
    stock: Any,
    tensors: Mapping[str, Any],
    peft_helper: Any,
    arguments: Mapping[str, Any],
    config: LoraConfig,
    names: ModuleNames,
    max_lora_rank: int,
) -> Any:
    """A LoRAModel of the dense tensors, each with the r and scaling of the adapter's config.

    Raises LayoutError for a factor with a larger r than `max_lora_rank`, the engine's.

    stock: vLLM's LoRAModel, the class. tensors: by their names in the adapter. arguments: the
    keyword arguments that vLLM gave to `from_local_checkpoint`.
    """
    model = stock.from_lora_tensors(
        tensors=dict(tensors),
        peft_helper=peft_helper,
        **{name: arguments[name] for name in _SHARED_ARGUMENTS if name in arguments},
    )
    # Releases before 0.32 ignore rank_pattern and alpha_pattern.
    for name in tensors:
        key = parse_key(name, 2)
        if isinstance(key, LoraKey) and (weights := model.loras.get(names.renamed(key.module))):
            weights.rank = weights.lora_a.shape[0]
            # They compare r of the config alone, and would fail in a step, at each use.
            if weights.rank > max_lora_rank and names.takes(key.module):
                raise LayoutError(
                    f"{name}: r={weights.rank}, but the engine has room for {max_lora_rank}.",
                    hint=f"Start vLLM with --max-lora-rank {smallest_max_lora_rank(weights.rank)}.",
                )
            weights.scaling = config.scaling_of(key.module, weights.rank)
    return model


def packed_experts(name: str, assembly: Assembly, tensors: Sequence[Any]) -> Any:
    """VLLM's PackedLoRALayerWeights of one MoE layer.

    name: of the live layer. tensors: one for each factor of the assembly, [slots, rows, cols];
    lora_B is scaled already.
    """
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    parts = len(assembly.lora_a)
    packed = PackedLoRALayerWeights(
        name,
        assembly.lora_rank,
        [assembly.lora_rank] * parts,
        [tensors[index] for index in assembly.lora_a],
        [tensors[index] for index in assembly.lora_b],
        scaling=[1] * parts,
    )
    mark_ready(packed)
    return packed


def mark_ready(weights: Any) -> None:
    """Say of weights that vLLM may have them as they are."""
    setattr(weights, _MARK, True)


def mark_dummy(weights: Any) -> None:
    """The same of weights that the warm-up has made up."""
    setattr(weights, _MARK, _DUMMY)


def is_ready(weights: Any) -> bool:
    """Whether that was said: of weights from `packed_experts`, and of a warm-up's dummies."""
    return hasattr(weights, _MARK)


def is_dummy(model: Any) -> bool:
    """Whether a LoRAModel is the warm-up's, or a clone of that."""
    return any(getattr(weights, _MARK, None) == _DUMMY for weights in model.loras.values())


def set_maps(model: Any, maps: ExpertMaps | None) -> None:
    """Note where the experts were as a LoRAModel was packed. maps: None if they never move."""
    setattr(model, _MAPS, maps)


def maps_of(model: Any) -> ExpertMaps | None:
    """What was noted; None where nothing was."""
    maps: ExpertMaps | None = getattr(model, _MAPS, None)
    return maps


def tensor_in(region: Any, entry: TensorEntry, begin: int) -> Any:
    """The torch tensor of a file's entry, in a region whose first byte is the file's `begin`.

    Raises LayoutError if its values are no floats.
    """
    import torch

    if entry.dtype not in TORCH_DTYPES:
        raise LayoutError(
            f"{entry.name} has dtype {entry.dtype}; vLLM takes LoRA tensors of floats only.",
            hint="Save the adapter without this tensor.",
        )
    data = torch.from_numpy(region)[entry.begin - begin : entry.end - begin]
    return data.view(getattr(torch, TORCH_DTYPES[entry.dtype])).view(entry.shape)


def safetensors_dtype(dtype: Any) -> str:
    """A torch dtype by its name in safetensors files: torch.bfloat16 -> BF16."""
    return FROM_TORCH[str(dtype).removeprefix("torch.")]
