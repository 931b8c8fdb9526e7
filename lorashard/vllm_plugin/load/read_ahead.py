"""An adapter that is read in a thread of its own, while the engine goes on with its steps.

Reading takes as long as several steps. What remains for the moment in which the adapter is added is
the copy to the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lorashard.vllm_plugin.load.report import LoadedAdapter
from lorashard.vllm_plugin.load.rests import with_rests


class ReadAhead:
    """One adapter that is being read, or has been. number: of the request for it."""

    def __init__(self, number: str, read: Callable[[], LoadedAdapter], device: Any) -> None:
        """Begin. device: to which what was read will be copied, on this thread's CUDA stream."""
        self.number = number
        self._read = read
        self._loaded: LoadedAdapter | None = None
        self._error: Exception | None = None
        self._engine_stream = _current_stream(device)
        self._thread = threading.Thread(target=self._run, name="lorashard-read-ahead", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it was read, or could not be."""
        return not self._thread.is_alive()

    def wait(self) -> LoadedAdapter:
        """What was read, to be had once. Raises what reading it has raised."""
        self._thread.join()
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            raise self._error or RuntimeError("the adapter was taken already")
        return loaded

    def _run(self) -> None:
        import torch

        try:
            # A region of memory is free again once the streams of the thread that took it are done.
            with torch.cuda.stream(self._engine_stream), with_rests(self._engine_is_busy):
                self._loaded = self._read()
        except Exception as err:  # noqa: BLE001 - raised by `wait`
            self._error = err.with_traceback(None)  # which would keep the memory
        del self._read

    def _engine_is_busy(self) -> bool:
        return self._engine_stream is None or not self._engine_stream.query()


def _current_stream(device: Any) -> Any:
    """This thread's CUDA stream; None on the CPU."""
    import torch

    if getattr(device, "type", None) != "cuda":
        return None
    return torch.cuda.current_stream(device)
