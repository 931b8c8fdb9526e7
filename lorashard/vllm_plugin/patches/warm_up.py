"""The dummy adapters of vLLM's warm-up, for MoE layers whose experts are split over ranks.

Up to 0.21.0 vLLM makes a dummy for each of the model's experts, and indexes buffers that hold the
local ones only. On a rank without experts it still cannot make one (0.33.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lorashard.vllm_plugin.engine.live import WRAPPER_3D, moe_wrappers
from lorashard.vllm_plugin.load.lora_model import mark_dummy


def wrap_create_dummy_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRAModelManager.create_dummy_lora: zeros for the local experts, packed as for `set_lora`.

    vLLM makes the rest of the dummy.
    """

    def create_dummy_lora(self: Any, lora_id: int, rank: int, *args: Any, **kwargs: Any) -> Any:
        moe = {name: w for name, w in moe_wrappers(self).items() if _fails_in_vllm(w)}
        if not moe:
            return _ready(original(self, lora_id, rank, *args, **kwargs))
        matches = self._match_target_modules
        self._match_target_modules = lambda name, *more: name not in moe and matches(name, *more)
        try:
            dummy = original(self, lora_id, rank, *args, **kwargs)
        finally:
            del self._match_target_modules  # so that the class's own is back
        dummy.loras.update(_zeros(moe, rank))
        return _ready(dummy)

    return create_dummy_lora


def _ready(dummy: Any) -> Any:
    """The dummy, of whose experts vLLM may take any: a 3D layer's have r times their number as r."""
    for weights in dummy.loras.values():
        mark_dummy(weights)
    return dummy


def _fails_in_vllm(wrapper: Any) -> bool:
    """Whether vLLM cannot make a dummy for this layer.

    `n_slices` came with dummies of local size (0.22.1 lora/layers/fused_moe.py:47).
    """
    if not wrapper.base_layer.moe_config.moe_parallel_config.use_ep:
        return False
    return not hasattr(wrapper, "n_slices") or wrapper.w13_lora_a_stacked[0].shape[1] == 0


def _zeros(wrappers: dict[str, Any], rank: int) -> Iterator[tuple[str, Any]]:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    for name, wrapper in wrappers.items():
        # [gate, down, up], or [gate_up, down]; without a gate [up, down, up].
        w13 = list(zip(wrapper.w13_lora_a_stacked, wrapper.w13_lora_b_stacked, strict=True))
        w2 = (wrapper.w2_lora_a_stacked[0], wrapper.w2_lora_b_stacked[0])
        stacks = [w13[0], w2] + ([] if type(wrapper).__name__ == WRAPPER_3D else [w13[-1]])
        yield (
            name,
            PackedLoRALayerWeights(
                name,
                rank,
                [rank] * len(stacks),
                [_host_zeros(a, a.shape[1], rank, a.shape[3]) for a, _ in stacks],
                [_host_zeros(b, b.shape[1], b.shape[2], rank) for _, b in stacks],
                scaling=[1] * len(stacks),
            ),
        )


def _host_zeros(like: Any, *shape: int) -> Any:
    return like.new_zeros(shape, device="cpu")
