"""Adding a loaded adapter: on every rank, or on none.

After the load, vLLM evicts another adapter, merges, registers and activates the new one, which can
still fail on one rank alone, for example where the GPU is full. That rank would load the adapter at
its next use, and wait for the others, which have it already; or they would load what they have
evicted, and wait for the rank that has not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lorashard.vllm_plugin.load.agreement import held_by_all, load_together
from lorashard.vllm_plugin.patches.adapter_loading import agreeing_group, attached_loader


def wrap_add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager.add_adapter: if it fails on one rank after a load, no rank keeps the adapter.

    The ranks agree only after a load, which they have all done: what is there already is activated
    without asking anybody.
    """

    def add_adapter(self: Any, adapter_request: Any) -> Any:
        group, loader = agreeing_group(self), attached_loader(self)
        if group is None or loader is None:
            return original(self, adapter_request)
        loader.has_loaded = False
        try:
            added = original(self, adapter_request)
        except Exception as error:
            if loader.has_loaded:
                _take_out_together(self, adapter_request, group, error)
            raise
        if loader.has_loaded:
            _take_out_together(self, adapter_request, group, None)
        return added

    return add_adapter


def _take_out_together(
    worker_manager: Any, adapter_request: Any, group: Any, error: Exception | None
) -> None:
    """Take the adapter out again if any rank has an error; then raise on each."""
    try:
        load_together(partial(_outcome, error), group)
    except Exception:
        with suppress(Exception):  # what is half there may not be possible to remove as usual
            worker_manager.remove_adapter(adapter_request.lora_int_id)
        _keep_what_all_have(worker_manager, group)
        raise
    finally:
        del error  # see load_together


def _keep_what_all_have(worker_manager: Any, group: Any) -> None:
    """Remove what this rank still has, and another has evicted already. Never raises."""
    own: set[int] = set()
    with suppress(Exception):
        own = worker_manager.list_adapters()
    with suppress(Exception):  # the error of the load is the one to raise
        for number in own - held_by_all(own, group):
            with suppress(Exception):
                worker_manager.remove_adapter(number)


def _outcome(error: Exception | None) -> bool:
    if error is not None:
        raise error
    return True
