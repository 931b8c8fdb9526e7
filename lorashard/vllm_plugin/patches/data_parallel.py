"""Data parallelism: engines that share experts agree on the slots of LoRA. `slot_agreement` is what they agree by.

Where vLLM's engines exchange the sizes of their batches before each step, what each has to say of LoRA
goes along in the same tensor, in rows of its own. After it the slots are the same everywhere, and the
metadata of LoRA's kernels and the CUDA graph are chosen by the adapters of all engines.

vLLM has two model runners. V1 sets a step's adapters before that exchange and V2 after it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lorashard.vllm_plugin.engine.agreed_slots import Announcement, num_rows, slot_share
from lorashard.vllm_plugin.engine.facts import has_lora_and_ep
from lorashard.vllm_plugin.patches.slot_agreement import (
    SlotAgreement,
    attached_agreement,
    current_agreement,
)

logger = logging.getLogger("vllm.lorashard")

DATA_PARALLEL = "--data-parallel-size"  # the option that these patches are for


def wrap_run_all_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_run_ar` of the V1 runner: what engines say of LoRA goes along, and the slots are agreed on."""

    def _run_ar(*args: Any, **kwargs: Any) -> Any:
        agreement = current_agreement()
        if agreement is None:
            return original(*args, **kwargs)
        with _rows_along(original, agreement) as heard:
            reduced = original(*args, **kwargs)
        agreement.agree(heard())
        if agreement.is_serving:
            agreement.write_pending()
        return reduced

    return _run_ar


def wrap_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    """`sync_cudagraph_and_dp_padding` of the V2 runner: the same, and the graph is that for all adapters."""
    signature = inspect.signature(original)

    def sync_cudagraph_and_dp_padding(*args: Any, **kwargs: Any) -> Any:
        agreement = current_agreement()
        if agreement is None:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        with _rows_along(original, agreement) as heard:
            manager = call.arguments["cudagraph_manager"]
            if manager is not None and agreement.is_serving:
                call.arguments["cudagraph_manager"] = _GraphsOfAll(manager, agreement, heard)
            synced = original(*call.args, **call.kwargs)
        agreement.agree_once(heard)
        if agreement.is_serving and agreement.is_idle:
            agreement.write(None)
        return synced

    return sync_cudagraph_and_dp_padding


class _GraphsOfAll:
    """A CudaGraphManager that is asked after the exchange: it counts the adapters of all engines."""

    def __init__(
        self, manager: Any, agreement: SlotAgreement, heard: Callable[[], list[Announcement]]
    ) -> None:
        self._manager, self._agreement, self._heard = manager, agreement, heard

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        self._agreement.agree_once(self._heard)
        return self._manager.dispatch(
            *args, **kwargs | {"num_active_loras": self._agreement.num_active}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


@contextmanager
def _rows_along(
    original: Callable[..., Any], agreement: SlotAgreement
) -> Iterator[Callable[[], list[Announcement]]]:
    """While a function of vLLM runs, its all-reduce takes more rows along.

    Yields a function for what all engines have said, by rank.
    """
    heard: list[Announcement] = []

    def reduce(tensor: Any, all_reduce: Callable[[Any], Any]) -> None:
        heard[:] = _reduce_with_rows(tensor, all_reduce, agreement)

    def result() -> list[Announcement]:
        if not heard:
            raise RuntimeError(
                "lorashard: a step began without the exchange of the data-parallel engines"
            )
        return heard

    functions = original.__globals__
    name, stand_in = (
        ("dist", _Distributed(functions["dist"], reduce))
        if "dist" in functions
        else ("get_dp_group", functools.partial(_Group, functions["get_dp_group"], reduce))
    )
    before = functions[name]
    functions[name] = stand_in
    try:
        yield result
    finally:
        functions[name] = before


class _Distributed:
    """torch.distributed, whose all_reduce takes rows along."""

    def __init__(self, real: Any, reduce: Callable[..., None]) -> None:
        self._real, self._reduce = real, reduce

    def all_reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> None:
        self._reduce(tensor, lambda whole: self._real.all_reduce(whole, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Group:
    """vLLM's data-parallel group, whose cpu_all_reduce_ takes rows along (from 0.29)."""

    def __init__(self, get_dp_group: Callable[[], Any], reduce: Callable[..., None]) -> None:
        self._real, self._reduce = get_dp_group(), reduce

    def cpu_all_reduce_(self, tensor: Any) -> Any:
        self._reduce(tensor, self._real.cpu_all_reduce_)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _reduce_with_rows(
    tensor: Any, all_reduce: Callable[[Any], Any], agreement: SlotAgreement
) -> list[Announcement]:
    """Add up a tensor [rows, engines], int32, over the engines. Returns what they say in the rows below."""
    import torch

    slots = agreement.num_slots
    own = torch.zeros(num_rows(slots), agreement.dp_size, dtype=tensor.dtype)
    own[:, agreement.dp_rank] = torch.tensor(
        agreement.announcement().encode(slots), dtype=tensor.dtype
    )
    whole = torch.cat([tensor, own.to(tensor.device)])
    all_reduce(whole)
    tensor.copy_(whole[: len(tensor)])
    columns = whole[len(tensor) :].t().tolist()
    return [Announcement.decode(tuple(column), slots) for column in columns]


def wrap_dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    """CudagraphDispatcher.dispatch of the V1 runner: the graph is that for the adapters of all engines."""
    signature = inspect.signature(original)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        agreement = current_agreement()
        if agreement is None or not agreement.is_serving:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        if "has_lora" in call.arguments:  # not for a model that drafts, which has none
            call.arguments["num_active_loras"] = agreement.num_active
            call.arguments["has_lora"] = agreement.num_active > 0
        return original(*call.args, **call.kwargs)

    return dispatch


def wrap_num_active_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_num_active_loras_for_dispatch` of the V2 runner: here a step's adapters are known first."""

    def get_num_active_loras_for_dispatch(
        lora_config: Any, lora_state: Any, req_ids: Any, dummy_run: bool
    ) -> Any:
        agreement = current_agreement()
        if agreement is None or not agreement.is_serving:
            return original(lora_config, lora_state, req_ids, dummy_run)
        requests = () if dummy_run else lora_state.get_activate_loras(req_ids)
        agreement.want(requests)
        agreement.is_idle, agreement.writes_later = dummy_run, not dummy_run
        return len(requests)

    return get_num_active_loras_for_dispatch


def wrap_set_active_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.set_active_adapters: slots are given out by the agreement alone."""

    def set_active_adapters(self: Any, requests: Any, mapping: Any) -> Any:
        agreement = attached_agreement(self)
        if agreement is None or not agreement.is_serving or mapping is None:
            return original(self, requests, mapping)
        if _is_of_language_model(mapping):
            agreement.set_active(requests, mapping)
        else:  # of an encoder, in a step whose adapters are in their slots already
            self._adapter_manager.set_adapter_mapping(mapping)
        return None

    return set_active_adapters


def _is_of_language_model(mapping: Any) -> bool:
    kind = getattr(mapping, "type", None)
    return kind is None or kind.name == "LANGUAGE"


def wrap_activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """LRUCacheLoRAModelManager.activate_adapter: an adapter that is added gets a slot when it is used."""

    def activate_adapter(self: Any, lora_id: int) -> Any:
        agreement = attached_agreement(self)
        if agreement is None or agreement.gives_slots:
            return original(self, lora_id)
        return False

    return activate_adapter


def wrap_pin_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.pin_adapter: in host memory."""

    def pin_adapter(self: Any, adapter_id: int) -> Any:
        agreement = attached_agreement(self)
        if agreement is None or not agreement.is_serving:
            return original(self, adapter_id)
        self._adapter_manager._pin_lora_in_cpu_cache(adapter_id)  # noqa: SLF001
        return True

    return pin_adapter


def wrap_remove_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.remove_adapter: one that is in a slot stays until all engines are to remove it."""

    def remove_adapter(self: Any, adapter_id: int) -> Any:
        agreement = attached_agreement(self)
        if agreement is not None and agreement.remove(adapter_id):
            return True
        return original(self, adapter_id)

    return remove_adapter


def wrap_dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelRunnerMixin.maybe_dummy_run_with_lora: an idle engine's step keeps its adapters."""

    def maybe_dummy_run_with_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        agreement = attached_agreement(getattr(self, "lora_manager", None))
        if agreement is None or not agreement.is_serving:
            return original(self, *args, **kwargs)
        return nullcontext()

    return maybe_dummy_run_with_lora


def wrap_warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """Worker.compile_or_warm_up_model: after it, adapters are no dummies any more."""

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        agreement = attached_agreement(getattr(self.model_runner, "lora_manager", None))
        if agreement is not None:
            agreement.is_serving = True
        return result

    return compile_or_warm_up_model


def limit_adapters(scheduler: Any, vllm_config: Any) -> None:
    """Have a Scheduler use no more adapters at once than its engine's share of the slots."""
    parallel = vllm_config.parallel_config
    num_engines = int(getattr(parallel, "data_parallel_size", 1))
    if num_engines == 1 or not has_lora_and_ep(vllm_config):
        return
    share = slot_share(
        int(vllm_config.lora_config.max_loras), num_engines, int(parallel.data_parallel_rank)
    )
    limited = copy.copy(scheduler.lora_config)
    limited.max_loras = share
    scheduler.lora_config = limited
    logger.info(
        "lorashard: this engine serves %d adapters at a time, its share of the slots", share
    )
