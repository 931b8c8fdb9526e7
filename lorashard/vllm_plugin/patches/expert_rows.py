"""The LoRA of moved experts: rows of the LoRA stacks that travel with the experts' weights.

vLLM's EPLB moves, layer by layer, one row of each tensor that an MoE layer calls an expert weight.
The LoRA stacks of the layer, [slots, E_local, ...], have rows of the same experts. After the base
weights they are exchanged by the same communicator (`row_exchange`), those of the slots in use, and
put in place where vLLM does so with the base weights (`rebalancing`). What it takes beyond that:

- A slot that is written while a layer is on its way has other rows than those that arrive. So the
  writes of each slot are counted, from one arrival to the next. The ranks compare the counts before a
  layer leaves, and where they differ, or have changed when it arrives, the slot is written again from
  host memory.
- An adapter in host memory is packed for the experts of its load. Where these have moved since, its
  rows are moved on the GPU after they were written, in the same way, and copied back.

All ranks of expert parallelism do the same writes and commits in the same order, as they get the same
requests. What a rank does beyond that in its transfer thread is only to compare and to send.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.engine.live import moe_wrappers
from lorashard.vllm_plugin.load.expert_moves import plan_moves
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.lora_model import is_dummy, maps_of, set_maps
from lorashard.vllm_plugin.patches.moved_adapters import move_adapter
from lorashard.vllm_plugin.patches.published_maps import publish_maps
from lorashard.vllm_plugin.patches.row_batches import (
    MovingLayer,
    Workspace,
    batches_of,
    workspace_in,
)
from lorashard.vllm_plugin.patches.row_exchange import (
    Arrivals,
    communicator_like,
    exchange_rows,
    put_rows,
    say_numbers,
)
from lorashard.vllm_plugin.patches.row_tables import LayerTables, moving_stacks, tables_of

logger = logging.getLogger("vllm.lorashard")

# An attribute of vLLM's MoERunner, its LoRAModelManager, and of the first weight of each MoE layer.
_ROWS = "_lorashard_rows"
_UNUSED = -1


@dataclass(frozen=True, slots=True)
class LayerRows:
    """What an MoE layer knows of its LoRA. name: of the module."""

    rows: ExpertRows
    name: str

    def tag(self, expert_weights: Sequence[Any]) -> None:
        """Have the layer's expert weights know it, too: `layer_of` finds it there."""
        setattr(expert_weights[0], _ROWS, self)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Layers on their way. slots: what travels, and how often it was written before, on all ranks."""

    slots: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Arrived:
    """Rows of one layer that are not in place yet. name: of its module."""

    name: str
    layer: MovingLayer
    arrivals: Sequence[Arrivals]


class ExpertRows:
    """The LoRA rows of one LoRA manager's MoE layers. names: of those that EPLB moves, in its order."""

    def __init__(self, manager: Any, loader: AdapterLoader) -> None:
        self.wrappers = moe_wrappers(manager)
        self.names: tuple[str, ...] = ()
        self.num_slots = int(manager.lora_config.max_loras)
        self.lock = threading.Lock()  # held while slots are written
        self._manager = manager
        self.loader = loader
        self._writes = [0] * self.num_slots
        self._written: Any = None  # CUDA event after the last write
        self._transfer: Transfer | None = None
        self._tables: dict[str, LayerTables] = {}
        self._space: Workspace  # for the rows of a layer that arrive; from `bind` on
        self._arrived: _Arrived | None = None
        self._num_moved = 0  # experts, in the cycle that goes on

    def bind(self, names: Sequence[str], maps: ExpertMaps) -> None:
        """EPLB has taken the layers on, in this order."""
        self.names = tuple(names)
        self.loader.maps = maps
        tables = tables_of([moving_stacks(self.wrappers[name]) for name in names])
        self._tables = dict(zip(names, tables, strict=True))
        size = max(rows.values_of_a_slot for rows in tables)
        self._space = Workspace(tables[0].tables[0].new_empty(self.num_slots * size))

    def announce(self, group: Any) -> Callable[[], list[list[int]]]:
        """Say what is in this rank's slots. What comes back is for `begin_transfer`, and waits for the others.

        group: of the ranks, on the CPU. In any thread.
        """
        with self.lock:
            slots = self._manager.lora_index_to_id
            own = [w if slots[n] is not None else _UNUSED for n, w in enumerate(self._writes)]
            written = self._written
        if written is not None:
            written.synchronize()  # what the other ranks are about to read is there
        return say_numbers(own, group)

    def begin_transfer(self, said: Callable[[], list[list[int]]]) -> frozenset[int]:
        """The slots whose rows travel with the layer that is next, the same on all ranks."""
        agreed = {
            slot: writes[0]
            for slot, writes in enumerate(zip(*said(), strict=True))
            if writes[0] != _UNUSED and len(set(writes)) == 1
        }
        self._transfer = Transfer(agreed)
        return frozenset(agreed)

    def send(
        self,
        name: str,
        before: Sequence[int],
        after: Sequence[int],
        group: Any,
        communicator: Any,
        stream: Any = None,
    ) -> None:
        """A layer's rows go to the other ranks, and theirs arrive beside the stacks. In any thread.

        before, after: the layer's maps. group: of the ranks. stream: that of the communicator.
        """
        import torch

        slots = self._travelling()
        if not slots:
            return
        layer = self._moving_layer(name, before, after, group)
        communicator = communicator_like(communicator, group, self._manager.device, stream)
        with _any_tensors(), torch.cuda.stream(stream):
            (arrivals,) = exchange_rows([layer], slots, group.rank(), communicator, self._space)
        self._arrived = _Arrived(name, layer, arrivals)

    def put(self, name: str) -> None:
        """What has arrived for a layer goes into its stacks, if anything has."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            assert arrived.name == name
            with _any_tensors():
                put_rows([arrived.layer], [arrived.arrivals])

    def move_all(
        self,
        before: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
        group: Any,
        communicator: Any,
        buffers: Sequence[Any],
    ) -> None:
        """`send` and `put` for all layers, as many at a time as there is room for.

        before, after: their maps. buffers: tensors on the device that nothing is kept in meanwhile.
        """
        slots = self._travelling()
        if not slots:
            return
        layers = [
            self._moving_layer(*each, group) for each in zip(self.names, before, after, strict=True)
        ]
        own = communicator_like(communicator, group, self._manager.device, None)
        with _any_tensors():
            # What goes through host memory takes as much of that.
            room = self._space.arriving
            space = workspace_in(buffers, room.dtype) if own is communicator else None
            if space is None or len(space.arriving) < len(room):
                space = self._space
            for batch in batches_of(layers, len(slots), space):
                put_rows(batch, exchange_rows(batch, slots, group.rank(), own, space))

    def _travelling(self) -> list[int]:
        assert self._transfer is not None
        return sorted(self._transfer.slots)

    def _moving_layer(
        self, name: str, before: Sequence[int], after: Sequence[int], group: Any
    ) -> MovingLayer:
        moves = plan_moves(before, after, group.size(), group.rank())
        return MovingLayer(self._tables[name], moves)

    def arrived(self, layers: Mapping[int, Sequence[int]]) -> None:
        """Layers have their new maps, and what has travelled is in place. By EPLB's number of a layer."""
        transfer, self._transfer = self._transfer, None
        maps = self._maps()
        if self.loader.slot_ahead is not None:  # its slot may have travelled for the one before
            self.loader.slot_ahead.withdraw()
        for layer, slots in layers.items():
            before = maps.layers[self.names[layer]]
            self._num_moved += sum(old != new for old, new in zip(before, slots, strict=True))
            maps = maps.with_layer(self.names[layer], slots)
        self.loader.maps = maps
        carried = transfer.slots if transfer is not None else {}
        names = tuple(self.names[layer] for layer in layers)
        with self.lock, _any_tensors():
            for slot, number in enumerate(self._manager.lora_index_to_id):
                if number is not None and carried.get(slot) != self._writes[slot]:
                    self._write_again(names, slot, number)
            # All ranks are here, and no layer is on its way. A load that failed on one of them may
            # have left them with different counts.
            self._writes = [0] * self.num_slots
            self._note_written()

    def end_of_cycle(self) -> None:
        """All layers have arrived: say where the experts are."""
        moved, self._num_moved = self._num_moved, 0
        used = sum(number is not None for number in self._manager.lora_index_to_id)
        publish_maps(
            self.loader,
            f"{moved} slots of {len(self.names)} layers hold other experts now, "
            f"and so does the LoRA of {used} adapters",
        )

    def activated(self, number: int) -> None:
        """An adapter was written into its slot. The caller holds the lock."""
        slot = self._manager.lora_index_to_id.index(number)
        model = self._manager.get_adapter(number)
        if not self.names and not is_dummy(model):
            raise RuntimeError("EPLB has not taken on the MoE layers that have LoRA")
        self._writes[slot] += 1
        with _any_tensors():
            self._move(model, self.names, slot)
        self._note_written()

    def note_packed(self, model: Any) -> None:
        """A LoRAModel of any origin was packed just now, if nothing else is known of it."""
        if not is_dummy(model) and maps_of(model) is None:
            set_maps(model, self.loader.maps)

    def _maps(self) -> ExpertMaps:
        assert self.loader.maps is not None
        return self.loader.maps

    def _note_written(self) -> None:
        if self._manager.device.type == "cuda":
            import torch

            self._written = torch.cuda.current_stream(self._manager.device).record_event()

    def _move(self, model: Any, names: Sequence[str], slot: int) -> None:
        """Bring rows that were written to where the experts are now. On all ranks at once."""
        if names:
            move_adapter(
                self._manager, self.wrappers, self._tables, model, names, slot, self._maps()
            )

    def _write_again(self, names: Sequence[str], slot: int, number: int) -> None:
        """Layers of one slot, from host memory."""
        model = self._manager.get_adapter(number)
        for name in names:
            weights = self._manager._get_lora_layer_weights(model, name)  # noqa: SLF001
            if weights is None:
                self.wrappers[name].reset_lora(slot)
            else:
                self.wrappers[name].set_lora(slot, weights.lora_a, weights.lora_b)
        self._move(model, names, slot)


def attach_rows(manager: Any, loader: AdapterLoader) -> ExpertRows:
    """Have the MoE layers of a LoRAModelManager, and itself, know its rows."""
    rows = ExpertRows(manager, loader)
    setattr(manager, _ROWS, rows)
    for name, wrapper in rows.wrappers.items():
        setattr(wrapper.base_layer, _ROWS, LayerRows(rows, name))
    return rows


def attached_rows(manager: Any) -> ExpertRows | None:
    """The rows of a LoRAModelManager; None without EPLB."""
    rows: ExpertRows | None = getattr(manager, _ROWS, None)
    return rows


def layer_rows(layer: Any) -> LayerRows | None:
    """What an MoE layer of the model knows of its LoRA; None if it has none, or without EPLB."""
    found: LayerRows | None = getattr(layer, _ROWS, None)
    return found


def layer_of(expert_weights: Sequence[Any]) -> LayerRows | None:
    """The layer that these are the expert weights of, as `LayerRows.tag` has noted there."""
    found: LayerRows | None = getattr(expert_weights[0], _ROWS, None)
    return found


def _any_tensors() -> Any:
    """A mode in which tensors may be written whichever mode they were made in: vLLM adds adapters in
    steps, which are in inference mode, and between them.
    """
    import torch

    return torch.inference_mode()
