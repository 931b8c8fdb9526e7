"""verl's worker extension for vLLM, as it is, with a word on how each adapter came in.

    LLM(..., worker_extension_cls="tests.gpu.verl_worker.Extension")

Imported in vLLM's workers only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.verl_files import worker_extension_module

_verl = worker_extension_module()


class Extension(_verl.vLLMColocateWorkerExtension):  # type: ignore[misc, name-defined]
    """Its `update_weights_from_ipc` is what verl calls at every step."""

    def _update_weights(
        self, weights: list[tuple[str, Tensor]], peft_config: dict[str, Any], base_sync_done: bool
    ) -> None:
        self._arrived = {
            "tensors": len(weights),
            "devices": sorted({tensor.device.type for _, tensor in weights}),
        }
        super()._update_weights(weights, peft_config, base_sync_done)

    def arrived(self) -> dict[str, Any]:
        """Of the last adapter: how many tensors came, and on which devices they were."""
        return self._arrived

    def update_from_file(self, adapter: str, peft_config: dict[str, Any]) -> None:
        """verl's update with tensors in this process's own memory: on the CPU.

        Its transfer puts them on the GPU in any case.
        """
        tensors = load_file(Path(adapter) / "adapter_model.safetensors")
        self.remove_lora(_verl.VLLM_LORA_INT_ID)
        self._update_weights(list(tensors.items()), peft_config, base_sync_done=True)
