"""AdapterLayout x PeftTarget -> every byte of the new adapter, before one is written. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorashard.adapter.config import LoraConfig, parse_config
from lorashard.adapter.keys import LoraKey, parse_key
from lorashard.adapter.layout import AdapterLayout
from lorashard.convert.fused import build_fused_modules
from lorashard.convert.notes import conversion_notes
from lorashard.convert.peft_config import ModuleSetting, write_config
from lorashard.convert.peft_tensors import OutputTensor, TrainedModule
from lorashard.convert.per_expert import build_per_expert_modules
from lorashard.convert.scaling import find_alpha
from lorashard.convert.target import PeftTarget
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry, build_header
from lorashard.shards.plan import ShardPlan


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything decided, nothing written.

    config: adapter_config.json. header: the start of the new weights, up to their data.
    tensors: in file order, made of parts of stacks, or an entry of the replicated file to copy.
    size_bytes: of the new weights. notes: worth telling the user.
    """

    config: bytes
    header: bytes
    tensors: tuple[OutputTensor | TensorEntry, ...]
    size_bytes: int
    notes: tuple[str, ...]


def plan_conversion(
    source: AdapterLayout,
    shard_plan: ShardPlan,
    config: LoraConfig,
    config_bytes: bytes,
    target: PeftTarget,
) -> ConversionPlan:
    """Decide every byte. config, config_bytes: the source's adapter_config.json, parsed and raw.

    Raises LayoutError for what the target's layout cannot express.
    """
    modules = tuple(_build_modules(source, target))
    names = source.replicated_names
    replicated = [entry for entry in shard_plan.files[0].tensors if entry.name in names]
    tensors = _tensors_by_name(replicated, modules)
    header, entries = build_header(
        [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors.values()],
        {"format": "pt"},
    )
    if not _has_same_tensors(source, config, tensors, target):
        config_bytes = _new_config(config, config_bytes, replicated, modules, target)
    _check_config(config_bytes, modules)
    return ConversionPlan(
        config=config_bytes,
        header=header,
        tensors=tuple(tensors[entry.name] for entry in entries),
        size_bytes=entries[-1].end,
        notes=tuple(conversion_notes(source, config_bytes, replicated, modules, target)),
    )


def _build_modules(source: AdapterLayout, target: PeftTarget) -> Iterator[TrainedModule]:
    """What the new adapter trains, module by module."""
    build = build_per_expert_modules if target.layout == "per_expert" else build_fused_modules
    for module in source.modules:
        yield from build(module, source.num_experts, target)


def _tensors_by_name(
    replicated: Sequence[TensorEntry], modules: Sequence[TrainedModule]
) -> dict[str, OutputTensor | TensorEntry]:
    tensors: dict[str, OutputTensor | TensorEntry] = {entry.name: entry for entry in replicated}
    for tensor in (tensor for module in modules for tensor in module.tensors):
        if tensor.name in tensors:
            raise LayoutError(
                f"Two tensors would be called {tensor.name}.",
                hint="Rename the one in the adapter that is not an expert's factor.",
            )
        tensors[tensor.name] = tensor
    return tensors


def _has_same_tensors(
    source: AdapterLayout,
    config: LoraConfig,
    tensors: Mapping[str, OutputTensor | TensorEntry],
    target: PeftTarget,
) -> bool:
    """Whether PEFT wrote the source in this very layout, so that its config is right as it is."""
    is_same_layout = all(
        module.source_layout.is_peft_layout(target.layout, target.orientation)
        for module in source.modules
    )
    sources = (s.entry for m in source.modules for stack in m.stacks for s in stack.sources)
    before = {entry.name: entry.shape for entry in (*source.replicated, *sources)}
    after = {name: tensor.shape for name, tensor in tensors.items()}
    return config.saved_by_peft and is_same_layout and before == after


def _new_config(
    config: LoraConfig,
    config_bytes: bytes,
    replicated: Sequence[TensorEntry],
    modules: Sequence[TrainedModule],
    target: PeftTarget,
) -> bytes:
    keys = (parse_key(entry.name, len(entry.shape)) for entry in replicated)
    others = dict.fromkeys(key.module for key in keys if isinstance(key, LoraKey))
    experts = _expert_settings(modules, use_rslora=config.use_rslora)
    document = write_config(json.loads(config_bytes), config, target.layout, experts, tuple(others))
    ordered = dict(sorted(document.items()))  # the fields; the order of patterns has a meaning
    return (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()


def _expert_settings(modules: Sequence[TrainedModule], *, use_rslora: bool) -> list[ModuleSetting]:
    alphas: list[float | None] = []
    for module in modules:
        alpha = None
        if module.scaling is not None:
            alpha = find_alpha(module.scaling, module.lora_rank, use_rslora=use_rslora)
            assert alpha is not None, module
        alphas.append(alpha)
    # What is zero gets the alpha of its like, so that one pattern does for all.
    alpha_of_leaf = {_leaf(m): alpha for m, alpha in zip(modules, alphas) if alpha is not None}
    return [
        ModuleSetting(m.name, m.lora_rank, alpha_of_leaf[_leaf(m)] if alpha is None else alpha)
        for m, alpha in zip(modules, alphas)
    ]


def _leaf(module: TrainedModule) -> str:
    return module.name.rpartition(".")[2]


def _check_config(config_bytes: bytes, modules: Sequence[TrainedModule]) -> None:
    """PEFT's rules must lead from the new config to each module's r and scaling."""
    config = parse_config(config_bytes, "the new adapter_config.json")
    for module in modules:
        assert config.rank_of(module.name) == module.lora_rank, module.name
        scaling = config.scaling_of(module.name, module.lora_rank)
        assert module.scaling in (None, scaling), module.name
