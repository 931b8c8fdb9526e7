"""As an engine starts: what would be silently wrong is refused, and the loader is prepared.

All of it concerns the LoRA manager of a model with MoE layers. Without one, or without
--enable-lora, nothing here does more than call vLLM's own method.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from lorashard.version import __version__
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.contracts import contract_breaks
from lorashard.vllm_plugin.engine.facts import config_facts, module_facts
from lorashard.vllm_plugin.engine.guards import NIXL_EPLB, find_refusals
from lorashard.vllm_plugin.engine.live import moe_wrappers, slot_bytes
from lorashard.vllm_plugin.load.host_memory import affordable_buffers
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.patches.adapter_loading import attach_loader, stock_class
from lorashard.vllm_plugin.patches.apply import broken_patches, outcomes
from lorashard.vllm_plugin.patches.data_parallel import DATA_PARALLEL
from lorashard.vllm_plugin.patches.expert_rows import attach_rows
from lorashard.vllm_plugin.patches.foreign import log_foreign_patches, refuse_displaced
from lorashard.vllm_plugin.patches.rebalancing import EPLB
from lorashard.vllm_plugin.patches.refusals import enforce
from lorashard.vllm_plugin.patches.slot_agreement import attach_agreement

logger = logging.getLogger("vllm.lorashard")


def wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineArgs.create_engine_config: refuse before minutes are spent on loading a model."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if getattr(config, "lora_config", None) is not None:
            enforce(find_refusals(config_facts(config)))
        return config

    return create_engine_config


def wrap_create_lora_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.create_lora_manager: check the configuration, then the loaded model.

    With expert parallelism the loader and its buffers are made here, before the first request.
    """

    def create_lora_manager(self: Any, model: Any, vllm_config: Any = None) -> Any:
        if vllm_config is not None:
            enforce(find_refusals(config_facts(vllm_config)))
        wrapped = original(self, model, vllm_config)
        wrappers = moe_wrappers(self._adapter_manager)
        if vllm_config is not None and config_facts(vllm_config).expert_parallel and wrappers:
            stock = stock_class(self)
            refuse_displaced()
            log_foreign_patches()
            breaks = contract_breaks(self._adapter_manager, stock, broken_patches())
            facts = module_facts(
                vllm_config, wrappers, breaks, broken_patches(EPLB), broken_patches(DATA_PARALLEL)
            )
            enforce(find_refusals(facts))
            loader = attach_loader(self, stock)
            if facts.eplb and facts.eplb_obstacle in (None, NIXL_EPLB):
                attach_rows(self._adapter_manager, loader)
            if facts.data_parallel_size > 1 and not broken_patches(DATA_PARALLEL):
                rank = int(vllm_config.parallel_config.data_parallel_rank)
                attach_agreement(self, rank, facts.data_parallel_size, _gather)
            _warm(loader, slot_bytes(self._adapter_manager))
            _say_what_is_on(loader)
        return wrapped

    return create_lora_manager


def _say_what_is_on(loader: AdapterLoader) -> None:
    """One line in the log of an engine: without it, an operator cannot see that the plugin is there."""
    if loader.ep_rank == 0:
        logger.info(
            "lorashard %s is on (vLLM %s, %d patches applied): LoRA of experts in %d layers on %d ranks, "
            "each with its own",
            __version__,
            getattr(sys.modules.get("vllm"), "__version__", "of unknown version"),
            sum(outcome.state == "applied" for outcome in outcomes.values()),
            len(loader.experts),
            loader.ep_size,
        )


def _gather(own: Any) -> list[Any]:
    """What each data-parallel engine says, by rank."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_dp_group

    group = get_dp_group().cpu_group
    heard: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(heard, own, group)
    return heard


def _warm(loader: AdapterLoader, size: int) -> None:
    """Prepare buffers for adapters of `size` bytes; without them the first loads take longer."""
    try:
        loader.regions.warm(affordable_buffers(settings.warm_buffers(), size), size)
    except OSError as err:
        logger.warning("lorashard: cannot prepare buffers of %.2f GB: %s", size / 1e9, err)
