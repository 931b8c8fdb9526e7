"""An adapter that came about without the loader: its experts are packed before vLLM packs them.

Whoever makes a LoRAModel, it reaches the layers through `LoRAModelManager._add_adapter`, which takes
the experts [ep_rank * n, (ep_rank + 1) * n) from it, and refuses fused factors where layers are 2D.
Here they are taken by the layers' expert maps before, from every layout, and vLLM leaves them alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lorashard.errors import LorashardError
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader
from lorashard.vllm_plugin.patches.explanations import for_a_server
from lorashard.vllm_plugin.patches.foreign import refuse_displaced

logger = logging.getLogger("vllm.lorashard")


def wrap_add_adapter_to_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager._add_adapter: experts that are not packed yet are packed first."""

    def _add_adapter(self: Any, lora: Any) -> Any:
        loader = attached_loader(self)
        if loader is not None and loader.ep_size > 1:
            refuse_displaced()  # by a package that came after the start
            try:
                loader.pack_experts(lora)
            except LorashardError as err:
                raise ValueError(f"LoRA adapter {lora.id}: {for_a_server(err)}") from err
            if not lora.loras:
                # Tensors of this rank's experts alone, and none of them is trained. vLLM's packing
                # wants at least one module; without any, activating the adapter clears its slot.
                logger.warning(
                    "lorashard: adapter %d: no tensors were given on ep rank %d",
                    lora.id,
                    loader.ep_rank,
                )
                self._registered_adapters[lora.id] = lora
                return None
        return original(self, lora)

    return _add_adapter
