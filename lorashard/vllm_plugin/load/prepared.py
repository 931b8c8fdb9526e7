"""What was done of adding an adapter before it is added, in the thread that has read it."""

from __future__ import annotations

from typing import Any

from lorashard.vllm_plugin.load.device_copy import ExpertsOnDevice
from lorashard.vllm_plugin.load.report import LoadedAdapter
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead

NO_SLOT = -1


class PreparedAdapter:
    """An adapter that was read ahead, while it is added.

    on_device: its experts, to be taken from there as they go into a slot.
    """

    def __init__(self, loaded: LoadedAdapter) -> None:
        self._model = loaded.model
        self._is_packed = loaded.is_packed
        self._slot: SlotAhead | None = loaded.slot
        self.on_device = ExpertsOnDevice(loaded.model, loaded.on_device)

    def is_packed(self, model: Any) -> bool:
        """Whether a LoRAModel is this adapter's, and vLLM has packed it already."""
        return self._is_packed and model is self._model

    @property
    def slot(self) -> int:
        """The number of the slot that the adapter is in; NO_SLOT if it is in none."""
        return self._slot.index if self._slot is not None and self._slot.is_ready else NO_SLOT

    def slot_of(self, model: Any) -> int:
        """The same if a LoRAModel is this adapter's."""
        return self.slot if model is self._model else NO_SLOT

    def leave_slot(self) -> None:
        """It is not in a slot, on another rank if not on this one."""
        self._slot = None
