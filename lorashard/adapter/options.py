"""What the user or the base model says that the adapter's own files do not. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LoraBLayout = Literal["rank_major", "grouped_by_expert"]
Orientation = Literal["standard", "transposed"]
# One pair of lora_A and lora_B for each expert, or one for all experts of a module.
ExpertLayout = Literal["per_expert", "fused"]
GateUp = Literal["split", "concatenated", "interleaved", "none"]


@dataclass(frozen=True, slots=True)
class LayoutOptions:
    """Facts that decide between readings of the same tensors. None = not known.

    gate_up: how the base model stores gate and up rows.
    """

    num_experts: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    gate_up: GateUp | None = None
    lora_b_layout: LoraBLayout | None = None
    orientation: Orientation | None = None
