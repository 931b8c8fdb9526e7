"""The loader: an adapter -> vLLM's LoRAModel with the experts of this rank, packed.

One `AdapterLoader` per LoRA manager. vLLM's own `_load_adapter` keeps its steps (paths, config
checks, name mapping) and calls this for `from_local_checkpoint`, in place of `LoRAModel`; packages
that have an adapter in memory call it for `from_lora_tensors`. A load opens the adapter, matches it
with the engine's layers (`outcome`), reads this rank's bytes into a region of pinned host memory
(`filled_region`) and wraps them (`lora_model`). A LoRAModel that came about without the loader gets its
experts packed here, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorashard.adapter.options import GateUp, LayoutOptions
from lorashard.adapter.tensor_file import TensorFile
from lorashard.shards.directory import claims_to_be_shards
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps, place_layers
from lorashard.vllm_plugin.engine.live import LiveExperts, interleaves, live_experts, moe_wrappers
from lorashard.vllm_plugin.engine.names import ModuleNames, read_model_names
from lorashard.vllm_plugin.load.agreement import Exchange
from lorashard.vllm_plugin.load.bounded_exchange import Meetings
from lorashard.vllm_plugin.load.collector import paused_collection
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.filled_region import FilledRegion, fill_region
from lorashard.vllm_plugin.load.host_memory import local_workers
from lorashard.vllm_plugin.load.in_memory import config_of, find_raw_experts, narrow_stacks
from lorashard.vllm_plugin.load.kept_plans import KeptPlans
from lorashard.vllm_plugin.load.lora_model import (
    make_lora_model,
    safetensors_dtype,
    set_maps,
    tensor_in,
)
from lorashard.vllm_plugin.load.outcome import LoadOutcome, explain_load, strict_error
from lorashard.vllm_plugin.load.plain_source import open_plain_adapter, open_plain_tensors
from lorashard.vllm_plugin.load.prepared import PreparedAdapter
from lorashard.vllm_plugin.load.read_ahead import ReadAhead
from lorashard.vllm_plugin.load.regions import RegionPool
from lorashard.vllm_plugin.load.report import LoadedAdapter, LoadReport
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead
from lorashard.vllm_plugin.load.stages import Stages
from lorashard.vllm_plugin.load.threads import reader_threads


@dataclass(frozen=True, slots=True)
class _OpenedAdapter:
    """An adapter with experts. path, kind: as in LoadReport."""

    path: str
    kind: str
    contents: AdapterContents


@dataclass(frozen=True, slots=True)
class _Target:
    """What an adapter is loaded into.

    names: of its modules, and the model's. layers: as `AdapterLoader.experts`, placed by the maps.
    """

    names: ModuleNames
    layers: Mapping[str, LiveExperts]
    maps: ExpertMaps | None

    def local_experts(self, module: str) -> tuple[int, ...]:
        """This rank's experts of a module of the adapter, each once."""
        name = self.names.moe_module(module, self.layers)
        return tuple(dict.fromkeys(self.layers[name].local_experts)) if name else ()


class AdapterLoader:
    """Loads adapters for one LoRA manager, into regions of host memory that it keeps.

    experts: the engine's MoE layers on this rank, by name, in the order of the model, as they were
    at the start. maps: where their experts are now; None if they never move.
    plans: of the plain adapters loaded last. last_report: of the last load; None where vLLM's own
    loader did it, or it failed. most_adapters: that there are at a time.
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
        self.maps: ExpertMaps | None = None
        self.ep_size = max((live.ep_size for live in self.experts.values()), default=1)
        self.ep_rank = max((live.ep_rank for live in self.experts.values()), default=0)
        self._dtype = safetensors_dtype(manager.lora_config.lora_dtype)
        self._threads = reader_threads(settings.reader_threads(local_workers()))
        self.device = manager.device
        # One more than vLLM keeps: it loads an adapter before it evicts another.
        self.most_adapters = (
            int(manager.lora_config.max_cpu_loras or manager.lora_config.max_loras) + 1
        )
        self.regions = RegionPool(self.most_adapters, manager.device, self._threads)
        self.plans = KeptPlans()
        self.last_report: LoadReport | None = None
        self.ahead: ReadAhead | None = None  # an adapter that is to be added once it was read
        self.fills_slots_ahead = True
        self.slot_ahead: SlotAhead | None = None  # that this one is written into
        self._slot_stream: Any = None
        self.prepared: PreparedAdapter | None = None  # the one that is being added
        self._loading_one = threading.Lock()  # that one, and one that is loaded as it is added
        self.loading: Exchange | None = None  # for the load of the adapter that is being added
        self.meetings: Meetings | None = None  # on adapters that others than vLLM add
        self._model_names = read_model_names(manager)

    def slot_stream(self) -> Any | None:
        """The CUDA stream on which slots are written ahead; None on the CPU."""
        import torch

        if self._slot_stream is None and self.device.type == "cuda":
            self._slot_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._slot_stream

    def from_local_checkpoint(
        self, lora_dir: str, expected_lora_modules: Any, peft_helper: Any, **arguments: Any
    ) -> Any:
        """In place of `LoRAModel.from_local_checkpoint`: the same arguments, the same result.

        peft_helper: vLLM's reading of adapter_config.json.
        Raises ValueError for an adapter that cannot be served, as vLLM does.
        """
        self.last_report = None
        loaded = self.load(lora_dir, expected_lora_modules, peft_helper, self.maps, **arguments)
        self.last_report = loaded.report
        return loaded.model

    def load(
        self,
        lora_dir: str,
        expected_lora_modules: Any,
        peft_helper: Any,
        maps: ExpertMaps | None,
        *,
        to_device: bool = False,
        **arguments: Any,
    ) -> LoadedAdapter:
        """The same, in any thread. `last_report` stays as it is.

        maps: `self.maps`, at a moment that is the same for all ranks. to_device: have the experts on
        the device, too, if there is room for them.
        """
        target = self._target(maps, arguments)
        with self._loading_one, paused_collection(), ExitStack() as stack:
            stages = Stages()
            adapter = self._open(Path(lora_dir), target, stack)
            if adapter is not None:
                stages.end("open")
                return self._load(
                    adapter, peft_helper, target, arguments, stages, to_device=to_device
                )
        return LoadedAdapter(
            self._stock.from_local_checkpoint(
                lora_dir, expected_lora_modules, peft_helper=peft_helper, **arguments
            )
        )

    def from_lora_tensors(
        self,
        lora_model_id: int,
        tensors: Mapping[str, Any],
        peft_helper: Any,
        device: str = "cuda",
        dtype: Any = None,
        **arguments: Any,
    ) -> Any:
        """In place of `LoRAModel.from_lora_tensors`: the same arguments, the same result.

        tensors: on any device, with all experts or only this rank's; they are copied.
        Raises ValueError for an adapter that cannot be served, as vLLM does.
        """
        self.last_report = None
        arguments |= {"lora_model_id": lora_model_id, "device": device, "dtype": dtype}
        target = self._target(self.maps, arguments)
        with self._loading_one, paused_collection():
            stages = Stages()
            contents = None
            if self.ep_size > 1:
                file = TensorFile(f"the tensors of adapter {lora_model_id}", tensors)
                contents = self._open_tensors(file, config_of(peft_helper), target)
            if contents is not None:
                stages.end("open")
                adapter = _OpenedAdapter(file.name, "tensors", contents)
                loaded = self._load(adapter, peft_helper, target, arguments, stages)
                self.last_report = loaded.report
                return loaded.model
        return self._stock.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **arguments)

    def pack_experts(self, model: Any) -> None:
        """Give a LoRAModel of any origin this rank's experts, in place of what it has of experts.

        One that the loader has made stays as it is. Raises LorashardError for experts that cannot
        be served.
        """
        target = self._target(self.maps, {})
        narrow_stacks(model, target.layers)
        raw = find_raw_experts(model)
        if raw is None:
            return
        with self._loading_one, paused_collection():
            file = TensorFile(f"adapter {model.id}", raw.tensors)
            contents = self._open_tensors(file, raw.config, target)
            if contents is None:
                return
            outcome = explain_load(contents, target.layers, target.names, None)
            filled = self._fill(contents, outcome, Stages())
        for name in raw.names:
            del model.loras[name]
        model.loras.update(filled.experts)

    def _target(self, maps: ExpertMaps | None, arguments: Mapping[str, Any]) -> _Target:
        names = ModuleNames(self._manager, self._model_names, arguments)
        return _Target(names, place_layers(self.experts, maps), maps)

    def _open(self, path: Path, target: _Target, stack: ExitStack) -> _OpenedAdapter | None:
        """The adapter; None for one that vLLM's own loader gets right."""
        if claims_to_be_shards(path):
            return _OpenedAdapter(str(path), "shards", open_shard_directory(path, stack))
        if self.ep_size == 1:
            return None
        contents = open_plain_adapter(
            path, self.layout_options(), target.local_experts, stack, self.plans
        )
        return None if contents is None else _OpenedAdapter(str(path), "plain adapter", contents)

    def _open_tensors(
        self, file: TensorFile, config: bytes, target: _Target
    ) -> AdapterContents | None:
        # vLLM takes the columns of a fused lora_B in PEFT's order (0.33.0 lora/model_manager.py:1004).
        options = replace(self.layout_options(), lora_b_layout="rank_major")
        return open_plain_tensors(file, config, options, target.local_experts, self.plans)

    def _outcome(self, adapter: _OpenedAdapter, target: _Target) -> LoadOutcome:
        """What to load from where. Raises LorashardError for what the engine does not take."""
        contents = adapter.contents
        # Where experts move, no directory fits for long, so there is nothing to advise.
        is_placed = adapter.kind == "shards" and target.maps is None
        outcome = explain_load(
            contents, target.layers, target.names, adapter.path if is_placed else None
        )
        target.names.check_dense(contents.dense)
        if outcome.advice and settings.is_set(settings.STRICT):
            raise strict_error(adapter.path, outcome.advice)
        return outcome

    def _load(
        self,
        adapter: _OpenedAdapter,
        peft_helper: Any,
        target: _Target,
        arguments: Mapping[str, Any],
        stages: Stages,
        *,
        to_device: bool = False,
    ) -> LoadedAdapter:
        contents = adapter.contents
        outcome = self._outcome(adapter, target)
        filled = self._fill(contents, outcome, stages, to_device=to_device)
        begin, _ = contents.dense_range
        model = make_lora_model(
            self._stock,
            {entry.name: tensor_in(filled.region, entry, begin) for entry in contents.dense},
            peft_helper, arguments, contents.config, target.names,
            int(self._manager.lora_config.max_lora_rank),
        )  # fmt: skip
        for weights in model.loras.values():
            weights.optimize()  # which vLLM does while the engine waits
        model.loras.update(filled.experts)
        set_maps(model, target.maps)
        stages.end("wrap")
        report = LoadReport(
            path=adapter.path,
            kind=adapter.kind,
            num_local_experts=max((len(layer.experts) for layer in filled.layers), default=0),
            num_experts=contents.num_experts,
            num_layers=len(filled.layers),
            num_bytes=filled.num_bytes,
            seconds=sum(stages.seconds.values()),
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
            advice=outcome.advice if outcome.gives_advice else None,
            num_left_to_mtp=sum(map(target.names.is_left_to_mtp, contents.lora_names)),
            version=contents.version,
            maps=target.maps,
            stages=stages.seconds,
        )
        return LoadedAdapter(model, report, filled.on_device)

    def _fill(
        self,
        contents: AdapterContents,
        outcome: LoadOutcome,
        stages: Stages,
        *,
        to_device: bool = False,
    ) -> FilledRegion:
        return fill_region(
            contents,
            outcome,
            self.regions,
            self._threads,
            self._dtype,
            stages,
            copy_to=self.device if to_device else None,
        )

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
