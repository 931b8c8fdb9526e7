"""The replacements themselves: what the plugin does at each method that it patches.

Everything rests on the LoRA manager of a model that has MoE layers. Without one, or without
--enable-lora, nothing here does more than call vLLM's own method.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorashard.errors import LorashardError
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.contracts import contract_breaks
from lorashard.vllm_plugin.engine.facts import config_facts, module_facts
from lorashard.vllm_plugin.engine.guards import EngineFacts, find_refusals
from lorashard.vllm_plugin.engine.live import moe_wrappers, slot_bytes
from lorashard.vllm_plugin.load.agreement import load_together, tensor_parallel_group
from lorashard.vllm_plugin.load.host_memory import affordable_buffers
from lorashard.vllm_plugin.load.loader import AdapterLoader, LoadReport
from lorashard.vllm_plugin.load.shard_source import is_shard_directory
from lorashard.vllm_plugin.metrics import record_failure, record_load
from lorashard.vllm_plugin.patches.apply import broken

logger = logging.getLogger("vllm.lorashard")

_LOADER = "_lorashard_loader"


def wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineArgs.create_engine_config: refuse before minutes are spent on loading a model."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if getattr(config, "lora_config", None) is not None:
            _refuse(config_facts(config))
        return config

    return create_engine_config


def wrap_create_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.create_lora_manager: check this engine, make its loader."""

    def create_lora_manager(self: Any, model: Any, vllm_config: Any = None) -> Any:
        if vllm_config is not None:
            _refuse(config_facts(vllm_config))
        wrapped = original(self, model, vllm_config)
        wrappers = moe_wrappers(self._adapter_manager)
        if vllm_config is not None and config_facts(vllm_config).expert_parallel and wrappers:
            breaks = contract_breaks(self._adapter_manager, self._lora_model_cls, broken())
            _refuse(module_facts(vllm_config, wrappers, breaks))
            loader = AdapterLoader(self._adapter_manager, self._lora_model_cls)
            setattr(self, _LOADER, loader)
            _warm(loader, slot_bytes(self._adapter_manager))
        return wrapped

    return create_lora_manager


def wrap_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager._load_adapter: vLLM's own steps, with our loader in place of LoRAModel."""

    def load_adapter(self: Any, lora_request: Any) -> Any:
        loader: AdapterLoader | _LoaderOnDemand | None = getattr(self, _LOADER, None)
        if loader is None:
            loader = _LoaderOnDemand(self)
            setattr(self, _LOADER, loader)

        def load() -> Any:
            stock = self._lora_model_cls
            self._lora_model_cls = loader
            try:
                return original(self, lora_request)
            except LorashardError as err:  # to the kind that vLLM raises for an adapter
                record_failure(loader.ep_rank)
                raise ValueError(f"LoRA adapter {lora_request.lora_name!r}: {err}") from err
            finally:
                self._lora_model_cls = stock

        model = load_together(load, tensor_parallel_group() if loader.ep_size > 1 else None)
        if loader.last_report is not None:
            _report(loader.last_report, lora_request)
        return model

    return load_adapter


class _LoaderOnDemand:
    """Without expert parallelism: vLLM's own loading, until a shard directory is asked for."""

    ep_rank, ep_size = 0, 1

    def __init__(self, worker_manager: Any) -> None:
        self._manager = worker_manager._adapter_manager  # noqa: SLF001 - vLLM gives no other way
        self._stock = worker_manager._lora_model_cls  # noqa: SLF001
        self._loader: AdapterLoader | None = None

    @property
    def last_report(self) -> LoadReport | None:
        return self._loader.last_report if self._loader else None

    def from_local_checkpoint(self, lora_dir: str, *args: Any, **kwargs: Any) -> Any:
        if self._loader is None and is_shard_directory(Path(lora_dir)):
            breaks = contract_breaks(self._manager, self._stock, broken())
            _refuse(EngineFacts(expert_parallel=True, contract_breaks=breaks))
            self._loader = AdapterLoader(self._manager, self._stock)
        return (self._loader or self._stock).from_local_checkpoint(lora_dir, *args, **kwargs)


def _warm(loader: AdapterLoader, size: int) -> None:
    """Prepare buffers for adapters of `size` bytes; without them a first load takes longer."""
    try:
        loader.regions.warm(affordable_buffers(settings.warm_buffers(), size), size)
    except OSError as err:
        logger.warning("lorashard: no buffers of %.2f GB prepared: %s", size / 1e9, err)


def wrap_create_lora_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEWithLoRA.create_lora_weights: experts that EP splits are not sharded a second time.

    Fully sharded LoRA sums the shrunk activations over the tensor-parallel group. Under expert
    parallelism the ranks of that group hold different experts, so MoE layers stay whole and the
    dense layers are sharded as asked.
    """

    def create_lora_weights(
        self: Any, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> Any:
        parallel = self.base_layer.moe_config.moe_parallel_config
        if parallel.use_ep and lora_config.fully_sharded_loras:
            lora_config = copy.copy(lora_config)
            lora_config.fully_sharded_loras = False
        return original(self, max_loras, lora_config, model_config)

    return create_lora_weights


def _refuse(facts: EngineFacts) -> None:
    """Raise ValueError for what would be silently wrong, unless its variable allows it."""
    for refusal in find_refusals(facts):
        if not settings.is_set(refusal.variable):
            raise ValueError(str(refusal))
        logger.warning("lorashard: %s=1, so this goes on: %s", refusal.variable, refusal.reason)


def _report(report: LoadReport, lora_request: Any) -> None:
    logger.info(
        "lorashard: adapter %r (id %d) from %s: experts of ep rank %d of %d (%d of %d in each of "
        "%d layers), %.3f GB in %.3f s, %.1f GB/s",
        lora_request.lora_name, lora_request.lora_int_id, report.kind, report.ep_rank,
        report.ep_size, report.num_local_experts, report.num_experts, report.num_layers,
        report.num_bytes / 1e9, report.seconds, report.num_bytes / 1e9 / max(report.seconds, 1e-9),
    )  # fmt: skip
    if report.advice:
        logger.warning("lorashard: %s: %s", report.path, report.advice)
    record_load(report.ep_rank, report.kind, report.seconds, report.num_bytes)
