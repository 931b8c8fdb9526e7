"""What vLLM's options take, for code that does not import vLLM. Pure values."""

from __future__ import annotations

from typing import Literal

# --expert-placement-strategy
Strategy = Literal["linear", "round_robin"]

# FusedMoEWithLoRA / FusedMoE3DWithLoRA. Which one vLLM takes is a matter of the model
# (`is_3d_moe_weight`) and of `--enable-mixed-moe-lora-format`, not of the adapter's layout.
Wrapper = Literal["2d", "3d"]

# vLLM 0.33.0 config/lora.py:25, but for 1.
_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def smallest_max_lora_rank(lora_rank: int) -> int:
    """The smallest --max-lora-rank that takes an adapter of this r; beyond all of them r itself."""
    return next((size for size in _MAX_LORA_RANKS if size >= lora_rank), lora_rank)
