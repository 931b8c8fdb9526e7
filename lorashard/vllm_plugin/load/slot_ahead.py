"""A free LoRA slot that an adapter is written into before it is added, while the engine takes steps.

In: a slot that no adapter has. Out: the slot with the adapter in it, or nothing, if the engine needs
the slot for another adapter meanwhile. No request uses a slot until its adapter is active, so what is
in it until then does not matter: whoever takes a slot writes all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorashard.vllm_plugin.load.rests import rest_if_due


class Withdrawn(Exception):  # noqa: N818 - not an error
    """The slot was given to another adapter."""


class SlotAhead:
    """The slot. One thread writes into it; another, in which the engine takes steps, may withdraw it."""

    def __init__(self, index: int, device: Any) -> None:
        """In the thread of the engine's steps, whose GPU work may still read what was in the slot."""
        self.index = index
        self._device = device
        self._is_free = _event(device)
        self._lock = threading.Lock()  # held while a module's part of the slot is written
        self._stream: Any = None
        self._is_written = self._is_withdrawn = False

    @property
    def is_ready(self) -> bool:
        """Whether the adapter is in the slot, on the device."""
        with self._lock:
            return self._is_written and not self._is_withdrawn

    def write(
        self, do: Callable[[Mapping[str, Any]], object], modules: Mapping[str, Any], stream: Any
    ) -> None:
        """Have `do` write the part of each module, in their order. Returns once it is on the device.

        do: gets the modules, to be gone through once by `items()`. stream: a CUDA stream for it, None
        on the CPU. Raises Withdrawn, and what `do` raises.
        """
        import torch

        if stream is not None:
            stream.wait_event(self._is_free)
            stream.wait_stream(torch.cuda.current_stream(self._device))  # what the thread has made
            self._stream = stream
        # The stacks may have been made in inference mode; then only this mode may write them.
        with torch.inference_mode(), torch.cuda.stream(stream):
            do(_Parts(modules, self._parts))
        if stream is not None:
            stream.synchronize()
        with self._lock:
            self._is_written = True

    def withdraw(self) -> None:
        """Nothing is written into the slot from now on, but by what this thread does next."""
        with self._lock:
            self._is_withdrawn = True
            stream = self._stream
        if stream is not None:
            import torch

            torch.cuda.current_stream(self._device).wait_stream(stream)

    def _parts(self, modules: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, module in modules.items():
            with self._lock:
                if self._is_withdrawn:
                    raise Withdrawn
                yield name, module
            rest_if_due()


def _event(device: Any) -> Any:
    """What the current stream has to do until now; None on the CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.current_stream(device).record_event()


class _Parts(dict[str, Any]):
    """Modules that are gone through in a way of its own."""

    def __init__(
        self,
        modules: Mapping[str, Any],
        go_through: Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]],
    ) -> None:
        super().__init__(modules)
        self._go_through = go_through

    def items(self) -> Any:
        """The parts in their order, each while it may be written."""
        return self._go_through(dict(super().items()))
