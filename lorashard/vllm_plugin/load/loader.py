"""The loader: an adapter -> vLLM's LoRAModel with the experts of this rank, packed.

One `AdapterLoader` per LoRA manager. vLLM's own `_load_adapter` keeps its steps (paths, config
checks, name mapping) and calls this for `from_local_checkpoint`, in place of `LoRAModel`. A load
opens the adapter, matches it with the engine's layers (`outcome`), reads this rank's bytes into a
region of pinned host memory (`fill`) and wraps them (`lora_model`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.options import GateUp, LayoutOptions
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.shards.directory import claims_to_be_shards
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.live import interleaves, live_experts, moe_wrappers
from lorashard.vllm_plugin.engine.names import ModuleNames, read_model_names
from lorashard.vllm_plugin.load.collector import paused_collection
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.fill import Filler
from lorashard.vllm_plugin.load.kept_plans import KeptPlans
from lorashard.vllm_plugin.load.lora_model import (
    make_lora_model,
    packed_experts,
    safetensors_dtype,
    tensor_in,
)
from lorashard.vllm_plugin.load.outcome import LoadOutcome, explain_load, strict_error
from lorashard.vllm_plugin.load.plain_source import open_plain_adapter
from lorashard.vllm_plugin.load.reads import (
    CopyJob,
    LayerPlan,
    ReadJob,
    place_factors,
    plan_copies,
    plan_reads,
)
from lorashard.vllm_plugin.load.rearrangements import plan_rearrangements
from lorashard.vllm_plugin.load.regions import RegionPool
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from lorashard.vllm_plugin.load.threads import reader_threads


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did. advice: what to run instead, on the rank that gives it for all.

    num_left_to_mtp: modules of a block for multi-token prediction, which vLLM serves without LoRA.
    version: of what was read, to be compared between ranks.
    """

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
    num_left_to_mtp: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class _OpenedAdapter:
    """An adapter with experts. has_placement: it is a shard directory."""

    path: Path
    has_placement: bool
    contents: AdapterContents


class AdapterLoader:
    """Loads adapters for one LoRA manager, into regions of host memory that it keeps.

    experts: the engine's MoE layers on this rank, by name, in the order of the model.
    plans: of the plain adapters loaded last. last_report: of the last load; None where vLLM's own
    loader did it, or it failed.
    """

    def __init__(self, manager: Any, stock: Any) -> None:
        """manager: vLLM's LoRAModelManager. stock: vLLM's LoRAModel, the class."""
        self._manager = manager
        self._stock = stock
        interleaved = interleaves(manager)
        self.experts = {
            name: live_experts(name, wrapper, interleaved=interleaved)
            for name, wrapper in moe_wrappers(manager).items()
        }
        self.ep_size = max((live.ep_size for live in self.experts.values()), default=1)
        self.ep_rank = max((live.ep_rank for live in self.experts.values()), default=0)
        self._dtype = safetensors_dtype(manager.lora_config.lora_dtype)
        self._threads = reader_threads(settings.reader_threads())
        # One more than vLLM keeps: it loads an adapter before it evicts another.
        limit = int(manager.lora_config.max_cpu_loras or manager.lora_config.max_loras) + 1
        self.regions = RegionPool(limit, manager.device, self._threads)
        self.plans = KeptPlans()
        self.last_report: LoadReport | None = None
        self.has_loaded = False  # set once all ranks have agreed on a load
        self._model_names = read_model_names(manager)

    def from_local_checkpoint(
        self, lora_dir: str, expected_lora_modules: Any, peft_helper: Any, **arguments: Any
    ) -> Any:
        """In place of `LoRAModel.from_local_checkpoint`: the same arguments, the same result.

        peft_helper: vLLM's reading of adapter_config.json.
        Raises ValueError for an adapter that cannot be served, as vLLM does.
        """
        self.last_report = None
        began = time.perf_counter()
        names = ModuleNames(self._manager, self._model_names, arguments)
        with paused_collection(), ExitStack() as stack:
            adapter = self._open(Path(lora_dir), names, stack)
            if adapter is not None:
                outcome = self._outcome(adapter, names)
                return self._load(adapter, outcome, peft_helper, names, arguments, began)
        return self._stock.from_local_checkpoint(
            lora_dir, expected_lora_modules, peft_helper=peft_helper, **arguments
        )

    def _open(self, path: Path, names: ModuleNames, stack: ExitStack) -> _OpenedAdapter | None:
        """The adapter; None for one that vLLM's own loader gets right."""
        if claims_to_be_shards(path):
            return _OpenedAdapter(path, True, open_shard_directory(path, stack))
        if self.ep_size == 1:
            return None

        def local_experts(module: str) -> tuple[int, ...]:
            name = names.moe_module(module, self.experts)
            return self.experts[name].local_experts if name else ()

        contents = open_plain_adapter(path, self.layout_options(), local_experts, stack, self.plans)
        return None if contents is None else _OpenedAdapter(path, False, contents)

    def _outcome(self, adapter: _OpenedAdapter, names: ModuleNames) -> LoadOutcome:
        """What to load from where. Raises LorashardError for what the engine does not take."""
        path, contents = str(adapter.path), adapter.contents
        outcome = explain_load(
            contents, self.experts, names, path if adapter.has_placement else None
        )
        names.check_dense(contents.dense)
        if outcome.advice and settings.is_set(settings.STRICT):
            raise strict_error(path, outcome.advice)
        return outcome

    def _load(
        self,
        adapter: _OpenedAdapter,
        outcome: LoadOutcome,
        peft_helper: Any,
        names: ModuleNames,
        arguments: Mapping[str, Any],
        began: float,
    ) -> Any:
        contents = adapter.contents
        dense = contents.dense
        begin, end = (dense[0].begin, dense[-1].end) if dense else (0, 0)
        placed, size = place_factors(
            [layer.assembly for layer in outcome.layers], ELEMENT_SIZE[self._dtype], end - begin
        )
        layers = [
            LayerPlan(
                matched.live.name, factors, matched.runs, matched.live.local_experts,
                matched.contents.scaling,
            )
            for matched, factors in zip(outcome.layers, placed)
        ]  # fmt: skip
        region = self.regions.take(max(1, size))
        filler = Filler(region, contents.sources, self._dtype, self._threads)
        jobs: list[ReadJob | CopyJob] = [
            *plan_copies(begin, end),
            *plan_reads(layers, contents.sources.offset_of, self._dtype, contents.rearranged),
        ]
        num_bytes = filler.run(layers, jobs)
        # After the reads, which fill with zeros what a rearrangement may fill in part.
        num_bytes += filler.run((), list(plan_rearrangements(layers, contents.rearrangements)))
        model = make_lora_model(
            self._stock, {entry.name: tensor_in(region, entry, begin) for entry in dense},
            peft_helper, arguments, contents.config, names,
            int(self._manager.lora_config.max_lora_rank),
        )  # fmt: skip
        for matched, layer in zip(outcome.layers, layers):
            tensors = [filler.tensor(factor) for factor in layer.factors]
            model.loras[layer.name] = packed_experts(layer.name, matched.assembly, tensors)
        self.last_report = LoadReport(
            path=str(adapter.path),
            kind="shards" if adapter.has_placement else "plain adapter",
            num_local_experts=max((len(layer.experts) for layer in layers), default=0),
            num_experts=contents.num_experts,
            num_layers=len(layers),
            num_bytes=num_bytes,
            seconds=time.perf_counter() - began,
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
            advice=outcome.advice if outcome.gives_advice else None,
            num_left_to_mtp=sum(map(names.is_left_to_mtp, contents.lora_names)),
            version=contents.version,
        )
        return model

    def layout_options(self) -> LayoutOptions:
        """What the live layers say of a plain adapter's layout, as far as they agree."""

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
