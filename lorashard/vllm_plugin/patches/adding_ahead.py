"""What adding an adapter takes, done in the thread that has read it: packing, and filling a free slot.

Both are vLLM's own code, on a view of the LoRAModelManager that has lists of its own of what is there.
In the step that adds the adapter, these lists are brought up to date and nothing else is done. All
ranks use the slot, or none does: they agree on it as they agree on the load.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lorashard.vllm_plugin.load.device_copy import ExpertsOnDevice
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.prepared import NO_SLOT
from lorashard.vllm_plugin.load.report import LoadedAdapter
from lorashard.vllm_plugin.load.rests import rest_if_due
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead, Withdrawn
from lorashard.vllm_plugin.load.stages import Stages
from lorashard.vllm_plugin.patches.apply import original_of

logger = logging.getLogger("vllm.lorashard")


def free_slot(manager: Any) -> SlotAhead | None:
    """A slot that no adapter has, and that vLLM would take last; None if there is none."""
    slots = manager.lora_index_to_id
    free = [index for index, number in enumerate(slots) if number is None]
    return SlotAhead(free[-1], manager.device) if free else None


def prepare(
    loaded: LoadedAdapter, manager: Any, loader: AdapterLoader, slot: SlotAhead | None
) -> LoadedAdapter:
    """In the reading thread: pack an adapter, and write it into a slot.

    Raises what vLLM raises for an adapter that it cannot pack.
    """
    pack = _original(manager, "_add_adapter")
    activate = _original(manager, "activate_adapter")
    if loaded.report is None or not loaded.model.loras or pack is None or activate is None:
        return loaded
    rest_if_due()
    stages = Stages()
    view = _view(manager, {})
    # vLLM asks for each expert of a layer whether the adapter has it as a layer of its own.
    packed = loaded.model.loras
    view.packed_modules = {
        name: parts for name, parts in manager.packed_modules.items() if name not in packed
    }
    pack(view, loaded.model)
    rest_if_due()
    stages.end("pack")
    loaded = replace(_with_stages(loaded, stages), is_packed=True)
    if slot is None:
        return loaded
    on_device = ExpertsOnDevice(loaded.model, loaded.on_device)
    on_device.enter(loaded.model)
    try:
        write = partial(_write, activate, manager, loaded.model, slot.index)
        slot.write(write, manager.modules, loader.slot_stream())
    except Withdrawn:
        return loaded
    except Exception as err:  # noqa: BLE001 - no memory on the device, for example
        logger.warning("lorashard: an adapter is activated as it is added, not before (%r)", err)
        return loaded
    finally:
        on_device.leave()
    stages.end("write into the slot")
    return replace(_with_stages(loaded, stages), slot=slot, on_device={})


def _with_stages(loaded: LoadedAdapter, stages: Stages) -> LoadedAdapter:
    assert loaded.report is not None
    all_stages = {**loaded.report.stages, **stages.seconds}
    return replace(loaded, report=replace(loaded.report, stages=all_stages))


def _write(
    activate: Callable[..., Any], manager: Any, model: Any, index: int, modules: Any
) -> None:
    view = _view(manager, {model.id: model})
    view._active_adapters = {}  # noqa: SLF001 - vLLM gives no other way
    view.lora_index_to_id = [
        None if at == index else NO_SLOT for at in range(len(manager.lora_index_to_id))
    ]
    view.modules = modules
    activate(view, model.id)


def _view(manager: Any, registered: dict[int, Any]) -> Any:
    view = copy.copy(manager)
    view._registered_adapters = registered  # noqa: SLF001
    return view


def _original(manager: Any, method: str) -> Callable[..., Any] | None:
    """VLLM's function under one of ours; None if ours is not there."""
    for owner in reversed(type(manager).__mro__):  # below vLLM's own list of which are used
        found = original_of(vars(owner).get(method))
        if found is not None:
            return found
    return None
