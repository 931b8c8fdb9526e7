"""A vLLM worker extension: Qwen3-MoE starts although it has fewer experts than ranks.

vLLM's model classes refuse that, while its MoE layers are made for it: a rank without experts is
what the last ranks of a large group get. With two GPUs this is the way to have one.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import qwen3_moe

_block = qwen3_moe.Qwen3MoeSparseMoeBlock
_init = _block.__init__


def _init_unchecked(self: Any, *args: Any, **kwargs: Any) -> None:
    world_size = qwen3_moe.get_tensor_model_parallel_world_size
    qwen3_moe.get_tensor_model_parallel_world_size = lambda: 1
    try:
        _init(self, *args, **kwargs)
    finally:
        qwen3_moe.get_tensor_model_parallel_world_size = world_size
    self.tp_size = world_size()


class OneExpert:
    """Adds nothing to the worker: importing this module is what counts."""


_block.__init__ = _init_unchecked
