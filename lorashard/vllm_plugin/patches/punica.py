"""Two faults in PunicaWrapperGPU, vLLM's wrapper around the kernels of MoE LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def maps_uninitialised_ids(punica: type) -> bool:
    """Whether `moe_lora_align_block_size` translates expert ids after the CUDA op (to 0.20.2)."""
    return "expert_map[expert_ids]" in inspect.getsource(vars(punica)["moe_lora_align_block_size"])


def wrap_align_block_size(original: Callable[..., Any]) -> Callable[..., Any]:
    """PunicaWrapperGPU.moe_lora_align_block_size: global expert ids, translated by the CUDA op.

    The router's ids are global. The original tells the op to count the local experts only, which
    overruns its shared memory, and then indexes `expert_map` with ids that nothing has written.
    """
    from vllm import _custom_ops

    def moe_lora_align_block_size(
        self: Any,
        topk_ids: Any,
        num_tokens: int,
        block_size: int,
        num_experts: int,
        max_loras: int,
        adapter_enabled: Any,
        expert_map: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if expert_map is None:
            return original(
                self, topk_ids, num_tokens, block_size, num_experts, max_loras, adapter_enabled,
                None, *args, **kwargs,
            )  # fmt: skip
        mapping, _, _, _, lora_ids, *_ = self.token_mapping_meta.meta_args(
            num_tokens, self.lora_config.specialize_active_lora
        )
        num_experts = expert_map.numel()
        tokens, blocks = _padded(topk_ids.numel(), num_experts, block_size)
        int32 = {"dtype": mapping.dtype, "device": topk_ids.device}
        sorted_ids = topk_ids.new_empty((max_loras * tokens,), **int32)
        expert_ids = topk_ids.new_full((max_loras * blocks,), -1, **int32)
        num_tokens_post_pad = topk_ids.new_zeros((max_loras,), **int32)
        _custom_ops.moe_lora_align_block_size(
            topk_ids, mapping, num_experts, block_size, max_loras, tokens, blocks, sorted_ids,
            expert_ids, num_tokens_post_pad, adapter_enabled, lora_ids, expert_map,
        )  # fmt: skip
        return None, sorted_ids, expert_ids, num_tokens_post_pad

    return moe_lora_align_block_size


def _padded(num_ids: int, num_experts: int, block_size: int) -> tuple[int, int]:
    """How many ids an adapter needs room for with each expert's padded to whole blocks, and how
    many blocks that is.
    """
    tokens = min(num_ids + num_experts * (block_size - 1), num_ids * block_size)
    return tokens, -(-tokens // block_size)


def wrap_add_lora_fused_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    """PunicaWrapperGPU.add_lora_fused_moe: do nothing if the batch has no LoRA or the rank no experts.

    Up to 0.23 vLLM runs its kernel for a batch without LoRA, too. The token mapping is then that
    of the last batch with LoRA, and for small batches the kernel relies on it alone: base-model
    requests get an adapter's deltas (vLLM issue 42008). On a rank without experts the kernel's
    tensor descriptors cannot be made (0.21.0 ops/triton_ops/fused_moe_lora_op.py:486).
    """

    def add_lora_fused_moe(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.token_mapping_meta.no_lora_flag_cpu.item() or lora_a_stacked[0].shape[1] == 0:
            return None
        return original(self, y, x, lora_a_stacked, *args, **kwargs)

    return add_lora_fused_moe
