"""Loading an adapter: vLLM's own steps, with lorashard's loader in place of vLLM's LoRAModel.

`WorkerLoRAManager._load_adapter` resolves the path, checks the configuration, has
`self._lora_model_cls.from_local_checkpoint` read the files, and checks the result. A stand-in takes
the place of that class; everything else stays vLLM's. Under expert parallelism it stands there from
the start of the engine: verl and ms-swift put a `_load_adapter` of their own in the place of this
one, and call the class for `from_lora_tensors` as well. Without, it is there for a call of ours.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lorashard.errors import LorashardError
from lorashard.shards.directory import claims_to_be_shards
from lorashard.vllm_plugin.engine.contracts import contract_breaks
from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.engine.guards import contract_refusal
from lorashard.vllm_plugin.load.agreement import Exchange, do_together, tensor_parallel_group
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.prepared import NO_SLOT, PreparedAdapter
from lorashard.vllm_plugin.load.report import LoadedAdapter
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead
from lorashard.vllm_plugin.patches.adding_ahead import free_slot, prepare
from lorashard.vllm_plugin.patches.apply import broken_patches, original_of
from lorashard.vllm_plugin.patches.config_file import refuse_odd_config
from lorashard.vllm_plugin.patches.explanations import explain_refusal, for_a_server, text_of
from lorashard.vllm_plugin.patches.foreign import refuse_displaced
from lorashard.vllm_plugin.patches.load_report import report_failure, report_load
from lorashard.vllm_plugin.patches.reading_ahead import read_ahead, take_read
from lorashard.vllm_plugin.patches.refusals import enforce

logger = logging.getLogger("vllm.lorashard")

# What vLLM raises for a configuration that is wrong. An adapter that is not there is another kind.
_WRONG_CONFIGURATION = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
_LOADER = "_lorashard_loader"  # an attribute of vLLM's WorkerLoRAManager


def attach_loader(worker_manager: Any, lora_model_class: Any) -> AdapterLoader:
    """Give a WorkerLoRAManager, and its LoRAModelManager, a loader for its model, and return it."""
    manager = worker_manager._adapter_manager  # noqa: SLF001 - vLLM gives no other way
    loader = AdapterLoader(manager, lora_model_class)
    setattr(worker_manager, _LOADER, loader)
    setattr(manager, _LOADER, loader)
    if loader.ep_size > 1:
        worker_manager._lora_model_cls = LoraModelStandIn(worker_manager, lora_model_class)  # noqa: SLF001
    return loader


def attached_loader(manager: Any) -> AdapterLoader | None:
    """The loader of a WorkerLoRAManager or a LoRAModelManager, if it has one."""
    loader: AdapterLoader | None = getattr(manager, _LOADER, None)
    return loader


def agreeing_group(worker_manager: Any) -> Any | None:
    """The ranks that load an adapter together: those of expert parallelism, or None."""
    loader = attached_loader(worker_manager)
    return tensor_parallel_group() if loader is not None and loader.ep_size > 1 else None


def exchange_of(manager: Any) -> Exchange:
    """Where the ranks agree next on a load: that of the adapter that is being added, or a new one.

    manager: a WorkerLoRAManager or a LoRAModelManager.
    """
    loader = attached_loader(manager)
    if loader is None:
        return Exchange(None)
    if loader.loading is not None and not loader.loading.has_said:
        return loader.loading
    return Exchange(agreeing_group(manager), loader.most_adapters)


def wrap_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """WorkerLoRAManager._load_adapter: all ranks load with the stand-in, or none keeps the adapter.

    What raises after that is for `add_adapter` to settle with the other ranks.
    """

    def load_adapter(self: Any, lora_request: Any) -> Any:
        exchange = exchange_of(self)
        model = do_together(
            partial(_load_with_stand_in, original, self, lora_request),
            exchange,
            partial(_version, self),
            partial(_slot, self),
        )
        _agree_on_slot(self, exchange)
        _note_load(self, lora_request.lora_name, lora_request.lora_int_id)
        return model

    return load_adapter


def _note_load(worker_manager: Any, name: str, number: int) -> None:
    """Report a load on which the ranks have agreed. Never raises."""
    loader = attached_loader(worker_manager)
    if loader is not None and loader.last_report is not None:
        report_load(loader.last_report, name, number)


def _version(worker_manager: Any) -> str:
    """The version of what the loader read last; empty if vLLM itself loaded the adapter."""
    loader = attached_loader(worker_manager)
    report = loader.last_report if loader is not None else None
    return "" if report is None else report.compared


def _slot(worker_manager: Any) -> int:
    """The slot that the adapter which is being added is in already."""
    loader = attached_loader(worker_manager)
    return NO_SLOT if loader is None or loader.prepared is None else loader.prepared.slot


def _agree_on_slot(worker_manager: Any, exchange: Exchange) -> None:
    """After the ranks have said what they loaded: all of them use the slot, or none does."""
    loader = attached_loader(worker_manager)
    if loader is None or loader.prepared is None:
        return
    if len({outcome.slot for outcome in exchange.hear()}) > 1:
        loader.prepared.leave_slot()


def _load_with_stand_in(original: Callable[..., Any], worker_manager: Any, request: Any) -> Any:
    """The LoRAModel of vLLM's own `_load_adapter`, or what was read for it before.

    Raises ValueError, as vLLM does, for an adapter that cannot be loaded.
    """
    stand_in = LoraModelStandIn(worker_manager, stock_class(worker_manager), agrees=False)
    try:
        was_read = _take_read(worker_manager, request)
        if was_read is not None:
            return was_read
        refuse_odd_config(request)
        return original(_with_class(worker_manager, stand_in), request)
    except LorashardError as err:
        _count_failure(worker_manager)
        raise ValueError(f"LoRA adapter {request.lora_name!r}: {for_a_server(err)}") from err
    except Exception as err:
        _count_failure(worker_manager)
        if isinstance(err, _WRONG_CONFIGURATION) and not stand_in.was_asked:
            _raise_explained(err, worker_manager, request)
        raise


def _with_class(worker_manager: Any, stand_in: Any) -> Any:
    """A WorkerLoRAManager that has all of another but the class LoRAModel, for one call."""
    view = copy.copy(worker_manager)
    view._lora_model_cls = stand_in  # noqa: SLF001
    return view


def _take_read(worker_manager: Any, request: Any) -> Any | None:
    """The LoRAModel that was read before; None if this one was not."""
    loader = attached_loader(worker_manager)
    loaded = None if loader is None else take_read(loader, request)
    if loader is None or loaded is None:
        return None
    if loaded.report is not None and loaded.report.maps != loader.maps:
        return None  # experts have moved since, on all ranks: it is read again
    refuse_displaced()  # by a package that came after the start
    loader.last_report = loaded.report
    loader.prepared = PreparedAdapter(loaded)
    return loaded.model


def read_before_adding(worker_manager: Any, request: Any) -> bool:
    """Have an adapter read that is to be added soon. Whether there is nothing to wait for.

    Never raises: what cannot be read is told as it is added, on all ranks.
    """
    loader = attached_loader(worker_manager)
    load_adapter = original_of(type(worker_manager)._load_adapter)  # noqa: SLF001
    if loader is None or loader.ep_size == 1 or load_adapter is None:
        return True
    # The maps of now: all ranks come here between the same two steps.
    reading = _ReadingStandIn(loader, stock_class(worker_manager), loader.maps)
    read = partial(_read, reading, load_adapter, worker_manager, request)
    try:
        return read_ahead(loader, request, read, partial(_slot_to_fill, worker_manager, loader))
    except Exception as err:  # noqa: BLE001 - no memory for a thread, for example
        logger.warning("lorashard: an adapter is read as it is added, not before (%r)", err)
        return True


def _slot_to_fill(worker_manager: Any, loader: AdapterLoader) -> SlotAhead | None:
    if not loader.fills_slots_ahead:
        return None
    return free_slot(worker_manager._adapter_manager)  # noqa: SLF001


def _read(
    reading: _ReadingStandIn,
    load_adapter: Callable[..., Any],
    worker_manager: Any,
    request: Any,
    slot: SlotAhead | None,
) -> LoadedAdapter:
    """VLLM's own `_load_adapter`, in a thread, and what comes after it as far as it can be done there."""
    refuse_odd_config(request)
    model = load_adapter(_with_class(worker_manager, reading), request)
    if reading.loaded is None:
        return LoadedAdapter(model)
    loaded = replace(reading.loaded, model=model)
    return prepare(loaded, worker_manager._adapter_manager, reading.loader, slot)  # noqa: SLF001


def stock_class(worker_manager: Any) -> Any:
    """The class LoRAModel itself, where the stand-in may be in its place."""
    in_place = worker_manager._lora_model_cls  # noqa: SLF001
    return getattr(in_place, "stock", in_place)


def _raise_explained(error: Exception, worker_manager: Any, request: Any) -> None:
    """Raise ValueError with vLLM's text and lorashard's, if lorashard has something to say."""
    said = text_of(error)
    path = Path(str(getattr(request, "lora_path", ""))).expanduser()
    explanation = explain_refusal(path, said, attached_loader(worker_manager))
    if explanation is not None:
        raise ValueError(f"{said}\n  lorashard: {explanation}") from error


def _count_failure(worker_manager: Any) -> None:
    loader = attached_loader(worker_manager)
    report_failure(loader.ep_rank if loader is not None else 0)


class LoraModelStandIn:
    """What is found in place of the class LoRAModel.

    It passes what reads an adapter to the loader, or to the class itself where there is nothing to
    do for a loader. Any other attribute is the class's, and so is what a call makes.
    stock: the class. was_asked: vLLM has come as far as this.
    """

    def __init__(self, worker_manager: Any, stock: Any, *, agrees: bool = True) -> None:
        """agrees: the ranks agree on each load here, as nothing else does that."""
        self._worker_manager = worker_manager
        self._agrees = agrees
        self.stock = stock
        self.was_asked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class."""
        return self.stock(*args, **kwargs)

    def from_local_checkpoint(self, lora_dir: str, *args: Any, **kwargs: Any) -> Any:
        """The LoRAModel of an adapter; arguments and result are those of vLLM's method."""
        self.was_asked = True

        def read() -> Any:
            loader = _loader_for(Path(lora_dir), self._worker_manager, self.stock)
            reader = self.stock if loader is None else loader
            return reader.from_local_checkpoint(lora_dir, *args, **kwargs)

        return self._read(read, str(lora_dir), kwargs.get("lora_model_id"))

    def from_lora_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """The LoRAModel of an adapter in memory; arguments and result are those of vLLM's method."""
        self.was_asked = True
        loader = attached_loader(self._worker_manager)
        if loader is None:
            return self.stock.from_lora_tensors(*args, **kwargs)
        number = args[0] if args else kwargs.get("lora_model_id")
        return self._read(
            partial(loader.from_lora_tensors, *args, **kwargs), f"tensors {number}", number
        )

    def _read(self, read: Callable[[], Any], name: str, number: Any) -> Any:
        def checked_read() -> Any:
            loader = attached_loader(self._worker_manager)
            if loader is not None and loader.ep_size > 1:
                refuse_displaced()  # by a package that came after the start
            return read()

        if not self._agrees:
            return checked_read()
        try:
            model = do_together(
                checked_read,
                exchange_of(self._worker_manager),
                partial(_version, self._worker_manager),
            )
        except LorashardError as err:
            _count_failure(self._worker_manager)
            raise ValueError(f"LoRA adapter {name!r}: {for_a_server(err)}") from err
        except Exception:
            _count_failure(self._worker_manager)
            raise
        _note_load(self._worker_manager, name, number or 0)
        return model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


class _ReadingStandIn:
    """The same for an adapter that is read in a thread."""

    def __init__(self, loader: AdapterLoader, stock: Any, maps: ExpertMaps | None) -> None:
        self.loader = loader
        self._stock = stock
        self._maps = maps
        self.loaded: LoadedAdapter | None = None

    def from_local_checkpoint(
        self, lora_dir: str, expected_lora_modules: Any, peft_helper: Any, **kwargs: Any
    ) -> Any:
        """The LoRAModel of an adapter; arguments and result are those of vLLM's method."""
        self.loaded = self.loader.load(
            lora_dir, expected_lora_modules, peft_helper, self._maps, to_device=True, **kwargs
        )
        return self.loaded.model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


def _loader_for(
    adapter_dir: Path, worker_manager: Any, lora_model_class: Any
) -> AdapterLoader | None:
    """The manager's loader, which an engine with expert parallelism has from its start.

    Without expert parallelism vLLM loads plain adapters right, so the loader is made for the first
    shard directory, once vLLM has been found to be what the loader relies on. None until then.
    """
    loader = attached_loader(worker_manager)
    if loader is None and claims_to_be_shards(adapter_dir):
        manager = worker_manager._adapter_manager  # noqa: SLF001
        refusal = contract_refusal(contract_breaks(manager, lora_model_class, broken_patches()))
        enforce([refusal] if refusal is not None else [])
        loader = attach_loader(worker_manager, lora_model_class)
    return loader
