"""The loader: contents of an adapter -> vLLM's LoRAModel with pre-packed expert weights.

One `AdapterLoader` per LoRA manager. vLLM's own `_load_adapter` keeps its steps (paths, config
checks, name mapping) and asks it, in place of `LoRAModel`, for `from_local_checkpoint`. Tensors of
attention and dense layers go through vLLM's own `from_lora_tensors`; the experts' are put under
the wrapper's name as the lists that `set_lora` consumes, which vLLM's packing leaves alone
(0.33.0 lora/model_manager.py:849; held in tests/vllm_plugin/).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.keys import LoraKey, parse_key
from lorashard.adapter.options import GateUp, LayoutOptions
from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.errors import LayoutError, PlacementError
from lorashard.header import TensorEntry
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.live import LiveExperts, interleaves, live_experts, moe_wrappers
from lorashard.vllm_plugin.engine.names import ModuleNames, read_model_names
from lorashard.vllm_plugin.load.advice import is_first_concerned, resplit_advice
from lorashard.vllm_plugin.load.assembly import Assembly, assemble
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents, ModuleContents
from lorashard.vllm_plugin.load.fill import CopyJob, Filler, Job, LayerPlan, lay_out, make_jobs
from lorashard.vllm_plugin.load.plain_source import open_plain_adapter
from lorashard.vllm_plugin.load.regions import RegionPool
from lorashard.vllm_plugin.load.rows import find_runs
from lorashard.vllm_plugin.load.shard_source import is_shard_directory, open_shard_directory
from lorashard.vllm_plugin.load.threads import reader_threads
from lorashard.writing.blocks import BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did. advice: what to run instead, on the first rank that needs other files."""

    path: str
    kind: str
    num_local_experts: int
    num_experts: int
    num_layers: int
    num_bytes: int
    seconds: float
    ep_rank: int
    ep_size: int
    advice: str | None


@dataclass(frozen=True, slots=True)
class _Matched:
    """An experts container of the adapter, its live layer and how the two fit."""

    contents: ModuleContents
    live: LiveExperts
    assembly: Assembly


class AdapterLoader:
    """Loads adapters for one LoRA manager, into regions of host memory that it keeps."""

    def __init__(self, manager: Any, stock: Any) -> None:
        """manager: vLLM's LoRAModelManager. stock: vLLM's LoRAModel, a class."""
        self._manager = manager
        self._stock = stock
        interleaved = interleaves(manager)
        self.experts = {
            name: live_experts(name, wrapper, interleaved=interleaved)
            for name, wrapper in moe_wrappers(manager).items()
        }
        self.ep_size = max((live.ep_size for live in self.experts.values()), default=1)
        self.ep_rank = max((live.ep_rank for live in self.experts.values()), default=0)
        self._dtype = _safetensors_name(manager.lora_config.lora_dtype)
        self._threads = reader_threads(settings.reader_threads())
        # Two more than vLLM keeps: it loads an adapter before it evicts another, and a plain one is
        # sliced in a region of its own.
        limit = int(manager.lora_config.max_cpu_loras or manager.lora_config.max_loras) + 2
        self.regions = RegionPool(limit, manager.device, self._threads)
        self.last_report: LoadReport | None = None
        self._model_names = read_model_names(manager)

    def from_local_checkpoint(
        self, lora_dir: str, expected_lora_modules: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of `LoRAModel.from_local_checkpoint`: the same arguments, the same result.

        Raises ValueError for an adapter that cannot be served, as vLLM does.
        """
        self.last_report = None
        path = Path(lora_dir)
        shards = is_shard_directory(path)
        if not shards and self.ep_size == 1:
            return self._stock.from_local_checkpoint(
                lora_dir, expected_lora_modules, *args, **kwargs
            )
        began = time.perf_counter()
        peft_helper = kwargs.get("peft_helper") or args[0]
        names = ModuleNames(self._manager, self._model_names, kwargs)
        with ExitStack() as stack:
            if shards:
                contents: AdapterContents | None = open_shard_directory(path, stack)
            else:
                contents = open_plain_adapter(
                    path, self._layout_options(),
                    lambda module: self._local_experts(module, names), stack, self._threads,
                    self.regions.take,
                )  # fmt: skip
            if contents is None:  # no experts: vLLM's own path is right
                return self._stock.from_local_checkpoint(
                    lora_dir, expected_lora_modules, *args, **kwargs
                )
            return self._load(contents, path, shards, peft_helper, names, kwargs, began)

    def _load(
        self,
        contents: AdapterContents,
        path: Path,
        shards: bool,
        peft_helper: Any,
        names: ModuleNames,
        kwargs: Mapping[str, Any],
        began: float,
    ) -> Any:
        matched = self._match(contents, names)
        dense = contents.dense
        names.check_dense(dense)
        begin, end = (dense[0].begin, dense[-1].end) if dense else (0, 0)
        places, size = lay_out(
            [m.assembly for m in matched], ELEMENT_SIZE[self._dtype], end - begin
        )
        layers = [self._layer_plan(m, place, shards) for m, place in zip(matched, places)]
        advice = self._advice(path, matched, layers) if shards else None
        region = self.regions.take(max(1, size))
        filler = Filler(region, contents.sources, self._dtype, self._threads)
        jobs: list[Job | CopyJob] = [
            *_copy_jobs(begin, end),
            *make_jobs(layers, contents.sources, self._dtype),
        ]
        num_bytes = filler.run(layers, jobs)
        tensors = {entry.name: _dense_view(region, entry, begin) for entry in dense}
        model = self._lora_model(contents.config, tensors, peft_helper, names, kwargs)
        for m, layer in zip(matched, layers):
            model.loras[m.live.name] = _packed(m, [filler.tensor(p) for p in layer.places])
        self.last_report = LoadReport(
            path=str(path),
            kind="shards" if shards else "plain adapter",
            num_local_experts=max((len(layer.experts) for layer in layers), default=0),
            num_experts=contents.num_experts,
            num_layers=len(layers),
            num_bytes=num_bytes,
            seconds=time.perf_counter() - began,
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
            advice=advice,
        )
        return model

    def _advice(
        self, path: Path, matched: Sequence[_Matched], layers: Sequence[LayerPlan]
    ) -> str | None:
        """What to say if other ranks' files are needed; an error where that is wished."""
        ranks = [m.contents.ranks for m in matched]
        advice = resplit_advice(path, matched[0].live, ranks, layers) if matched else None
        if advice and settings.is_set(settings.STRICT):
            raise PlacementError(
                f"{path}: {advice}", hint=f"{settings.STRICT} makes this an error."
            )
        return advice if matched and is_first_concerned(matched[0].live, ranks[0]) else None

    def _match(self, contents: AdapterContents, names: ModuleNames) -> list[_Matched]:
        """Each container with its live layer, in the order of the model's layers."""
        found: dict[str, _Matched] = {}
        for module in contents.modules:
            if names.is_elsewhere(module.name):
                continue
            live = self._live(module.name, names)
            if live is None:
                raise LayoutError(
                    f"{module.name}: no MoE layer of the model takes this module of the adapter.",
                    hint="Is the adapter for this model?",
                )
            if contents.num_experts != live.num_experts:
                raise LayoutError(
                    f"{module.name}: the adapter has {contents.num_experts} experts, "
                    f"{live.name} has {live.num_experts}.",
                    hint="Is the adapter for this model? `lorashard split --model` checks it.",
                )
            if live.name in found:
                raise LayoutError(
                    f"{module.name} and {found[live.name].contents.name} are both {live.name}."
                )
            gate_up = module.gate_up
            if not contents.gate_up_known and gate_up in ("concatenated", "interleaved"):
                gate_up = "interleaved" if live.interleaved else "concatenated"
            assembly = assemble(live, module.stacks, gate_up, module.name)
            found[live.name] = _Matched(module, live, assembly)
        return [found[name] for name in self.experts if name in found]

    def _layer_plan(self, matched: _Matched, places: Any, shards: bool) -> LayerPlan:
        live, module = matched.live, matched.contents
        own = live.ep_rank if len(module.ranks) == live.ep_size else None
        runs = find_runs(module.ranks, live.local_experts, own if shards else 0)
        return LayerPlan(
            live.name, matched.assembly, runs, live.local_experts, module.scaling, places
        )

    def _live(self, module: str, names: ModuleNames) -> LiveExperts | None:
        name = names.moe_module(module, self.experts)
        return self.experts[name] if name else None

    def _local_experts(self, module: str, names: ModuleNames) -> tuple[int, ...]:
        live = self._live(module, names)
        return live.local_experts if live else ()

    def _lora_model(
        self,
        config: LoraConfig,
        tensors: dict[str, Any],
        peft_helper: Any,
        names: ModuleNames,
        kwargs: Mapping[str, Any],
    ) -> Any:
        passed_on = ("lora_model_id", "device", "dtype", "model_vocab_size", "weights_mapper",
                     "skip_prefixes")  # fmt: skip
        model = self._stock.from_lora_tensors(
            tensors=tensors,
            peft_helper=peft_helper,
            **{name: kwargs[name] for name in passed_on if name in kwargs},
        )
        # Releases before 0.30 do not know rank_pattern and alpha_pattern.
        for name in tensors:
            key = parse_key(name, 2)
            if isinstance(key, LoraKey) and (weights := model.loras.get(names.renamed(key.module))):
                weights.rank = weights.lora_a.shape[0]
                weights.scaling = config.scaling_of(key.module, weights.rank)
        return model

    def _layout_options(self) -> LayoutOptions:
        """What the live layers say, as far as they agree."""

        def agreed(values: Iterator[int]) -> int | None:
            distinct = set(values)
            return distinct.pop() if len(distinct) == 1 else None

        layers = tuple(self.experts.values())
        gate_up: GateUp = "interleaved" if layers[0].interleaved else "concatenated"
        return LayoutOptions(
            num_experts=agreed(live.num_experts for live in layers),
            hidden_size=agreed(live.hidden_size for live in layers),
            intermediate_size=agreed(live.intermediate_size for live in layers),
            gate_up=gate_up if layers[0].gated else "none",
        )


def _packed(matched: _Matched, tensors: Sequence[Any]) -> Any:
    """VLLM's PackedLoRALayerWeights around the tensors; scaling is in lora_b already."""
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    assembly = matched.assembly
    parts = len(assembly.lora_a)
    return PackedLoRALayerWeights(
        matched.live.name,
        assembly.lora_rank,
        [assembly.lora_rank] * parts,
        [tensors[index] for index in assembly.lora_a],
        [tensors[index] for index in assembly.lora_b],
        scaling=[1] * parts,
    )


def _copy_jobs(begin: int, end: int) -> Iterator[CopyJob]:
    for at in range(begin, end, BLOCK_BYTES):
        yield CopyJob(REPLICATED, at, at - begin, min(BLOCK_BYTES, end - at))


def _dense_view(region: Any, entry: TensorEntry, begin: int) -> Any:
    import torch

    data = torch.from_numpy(region)[entry.begin - begin : entry.end - begin]
    return data.view(getattr(torch, TORCH_DTYPES[entry.dtype])).view(entry.shape)


def _safetensors_name(dtype: Any) -> str:
    wanted = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in TORCH_DTYPES.items() if torch_name == wanted)
