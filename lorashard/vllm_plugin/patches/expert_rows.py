"""The LoRA of moved experts: rows of the LoRA stacks that travel with the experts' weights.

vLLM's EPLB moves, layer by layer, one row of each tensor that an MoE layer calls an expert weight.
For each LoRA slot the stacks of a layer are such tensors too, [E_local, ...], and `rebalancing` has
vLLM move those of the slots in use. What remains is done here:

- A slot that is written while a layer is on its way has other rows than those that arrive. So the
  writes of each slot are counted, from one arrival to the next. The ranks compare the counts before a
  layer leaves, and where they differ, or have changed when it arrives, the slot is written again from
  host memory.
- An adapter in host memory is packed for the experts of its load. Where these have moved since, its
  rows are moved on the GPU after they were written, by vLLM's own function, and copied back.

All ranks of expert parallelism do the same writes and commits in the same order, as they get the same
requests. What a rank does beyond that in its transfer thread is only to compare and to send.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.engine.live import WRAPPER_3D, moe_wrappers
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.lora_model import is_dummy, is_ready, maps_of, set_maps
from lorashard.vllm_plugin.patches.published_maps import publish_maps

logger = logging.getLogger("vllm.lorashard")

# An attribute of vLLM's MoERunner, its LoRAModelManager, and of row tensors.
_ROWS = "_lorashard_rows"
_LIMIT = timedelta(minutes=5)  # for which a rank waits for the others, where all come at once
_UNUSED = -1


@dataclass(frozen=True, slots=True)
class RowTag:
    """Whose rows a tensor has: those of one LoRA slot."""

    rows: ExpertRows
    slot: int


@dataclass(frozen=True, slots=True)
class LayerRows:
    """What an MoE layer knows of its LoRA. name: of the module."""

    rows: ExpertRows
    name: str

    def tensors(self) -> list[Any]:
        """The rows of all slots, tagged."""
        found = []
        wrapper = self.rows.wrappers[self.name]
        for slot in range(self.rows.num_slots):
            for tensor in row_tensors(wrapper, slot):
                setattr(tensor, _ROWS, RowTag(self.rows, slot))
                found.append(tensor)
        return found


@dataclass(frozen=True, slots=True)
class Transfer:
    """Layers on their way. slots: what travels, and how often it was written before, on all ranks."""

    slots: Mapping[int, int]


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
        self._num_moved = 0  # experts, in the cycle that goes on

    def bind(self, names: Sequence[str], maps: ExpertMaps) -> None:
        """EPLB has taken the layers on, in this order."""
        self.names = tuple(names)
        self.loader.maps = maps

    def begin_transfer(self, group: Any) -> frozenset[int]:
        """The slots whose rows travel with the layer that is next, the same on all ranks.

        group: of the ranks, on the CPU. In any thread.
        """
        with self.lock:
            slots = self._manager.lora_index_to_id
            own = [w if slots[n] is not None else _UNUSED for n, w in enumerate(self._writes)]
            written = self._written
        if written is not None:
            written.synchronize()  # what the other ranks are about to read is there
        said = _all_gather(own, group)
        agreed = {
            slot: writes[0]
            for slot, writes in enumerate(zip(*said, strict=True))
            if writes[0] != _UNUSED and len(set(writes)) == 1
        }
        self._transfer = Transfer(agreed)
        return frozenset(agreed)

    @property
    def traveling(self) -> frozenset[int]:
        """The slots whose rows travel with the layer that is on its way."""
        return frozenset(self._transfer.slots if self._transfer is not None else ())

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

    def _move(self, model: Any, names: Sequence[str], slot: int) -> None:
        """Bring the slot's rows, which are where the experts were as the adapter was packed, to where
        these are now. On all ranks at once.
        """
        packed, maps = maps_of(model), self._maps() if names else None
        if packed is None or maps is None:
            return
        moved = [name for name in names if packed.layers[name] != maps.layers[name]]
        if not moved:
            return
        import torch
        from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
        from vllm.distributed.parallel_state import get_ep_group

        group = get_ep_group()
        before, after = ([m.layers[name] for name in moved] for m in (packed, maps))
        self._check_alike(group.cpu_group, (model.id, slot, moved, before, after))
        rows = [row_tensors(self.wrappers[name], slot) for name in moved]
        rearrange_expert_weights_inplace(
            torch.tensor(before),
            torch.tensor(after),
            rows,
            [torch.empty_like(tensor) for tensor in rows[0]],
            group.device_group,
            _communicator(group.cpu_group, self._manager.device),
        )
        for name in moved:
            if self._copy_back(model, name, slot):
                packed = packed.with_layer(name, maps.layers[name])
        set_maps(model, packed)

    def _copy_back(self, model: Any, name: str, slot: int) -> bool:
        """Have host memory as the slot is. Whether it could be done."""
        weights = self._manager._get_lora_layer_weights(model, name)  # noqa: SLF001
        if weights is None:
            return True  # no rows
        if not is_ready(weights):
            return False  # of another package's making: whatever its memory is shared with
        for tensor, stack in _stacks_of(self.wrappers[name], weights):
            _, rows, cols = tensor.shape
            if tensor.shape[0] == stack.shape[1]:
                tensor.copy_(stack[slot, :, :rows, :cols])
        return True

    def _check_alike(self, group: Any, what: object) -> None:
        """Raise RuntimeError unless all ranks are about to move the same."""
        said = _all_gather([zlib.crc32(repr(what).encode())], group)
        if len({tuple(each) for each in said}) > 1:
            raise RuntimeError("the ranks differ in where an adapter's experts are")


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


def row_tag(tensor: Any) -> RowTag | None:
    """Whose rows a tensor has; None if it is no LoRA."""
    tag: RowTag | None = getattr(tensor, _ROWS, None)
    return tag


def rows_among(expert_weights: Sequence[Any]) -> ExpertRows | None:
    """The rows that one layer's expert weights include; None if they are the base weights alone."""
    tags = filter(None, map(row_tag, expert_weights))
    return next((tag.rows for tag in tags), None)


def row_tensors(wrapper: Any, slot: int) -> list[Any]:
    """One slot of a layer's stacks, [E_local, ...] each. What all experts share does not move."""
    shared = bool(getattr(wrapper, "enable_moe_shared_loras", False))
    stacks = [*wrapper.w13_lora_b_stacked, *wrapper.w2_lora_a_stacked]
    if not shared:
        stacks += [*wrapper.w13_lora_a_stacked, *wrapper.w2_lora_b_stacked]
    return [stack[slot].view(stack.shape[1], -1) for stack in stacks]


def _stacks_of(wrapper: Any, weights: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of one layer that `set_lora` takes, and the stack that it puts each into."""
    for tensors, w13, w2 in (
        (weights.lora_a, wrapper.w13_lora_a_stacked, wrapper.w2_lora_a_stacked),
        (weights.lora_b, wrapper.w13_lora_b_stacked, wrapper.w2_lora_b_stacked),
    ):
        is_3d = type(wrapper).__name__ == WRAPPER_3D
        stacks = (w13[0], w2[0]) if is_3d else (w13[0], w2[0], w13[-1])
        yield from zip(tensors, stacks, strict=True)


def _any_tensors() -> Any:
    """A mode in which tensors may be written whichever mode they were made in: vLLM adds adapters in
    steps, which are in inference mode, and between them.
    """
    import torch

    return torch.inference_mode()


def _all_gather(numbers: Sequence[int], group: Any) -> list[list[int]]:
    """What each rank says. Raises RuntimeError if one of them has not come in time."""
    import torch
    import torch.distributed as dist

    own = torch.tensor(numbers, dtype=torch.int64)
    said = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(said, own, group, async_op=True).wait(_LIMIT)
    return [each.tolist() for each in said]


def _communicator(cpu_group: Any, device: Any) -> Any:
    """VLLM's communicator for transfers of this thread, apart from those of EPLB's own."""
    from vllm.distributed.eplb import eplb_communicator

    if device.type == "cpu":
        return eplb_communicator.TorchDistNcclEplbCommunicator(cpu_group)  # plain send and receive
    return eplb_communicator.TorchDistGlooStagedEplbCommunicator(cpu_group)
