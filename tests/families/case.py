"""The description of one adapter to make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from families import Family


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter to make.

    lora: LoraConfig options that replace those of the family.
    from_per_expert: PEFT loads a per-expert adapter, converts it to fused experts and saves it.
    refuse: why lorashard must refuse the adapter, one word; None if it must split it.
    """

    name: str
    family: Family
    lora: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    adapter_name: str = "default"
    from_per_expert: bool = False
    refuse: str | None = None
