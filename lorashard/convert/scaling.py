"""A scaling -> the alpha and the r with which PEFT arrives at exactly that number. Pure."""

from __future__ import annotations

import math

from lorashard.errors import LayoutError


def find_alpha(scaling: float, lora_rank: int, *, use_rslora: bool) -> float | None:
    """The alpha from which PEFT computes exactly `scaling`, an int if there is one; None if none."""
    divisor = math.sqrt(lora_rank) if use_rslora else lora_rank
    near = scaling * divisor
    candidates: list[float] = [round(near), near]
    for direction in (0.0, math.inf):
        alpha = near
        for _ in range(4):  # the rounding errors of * and / add up to less
            alpha = math.nextafter(alpha, direction)
            candidates.append(alpha)
    return next((alpha for alpha in candidates if alpha > 0 and alpha / divisor == scaling), None)


def find_rank_with_alpha(
    scaling: float | None, lora_rank: int, *, use_rslora: bool, module: str
) -> int:
    """The smallest r >= `lora_rank` for which some alpha gives exactly `scaling`.

    Nearly always `lora_rank` itself; otherwise the rows and columns beyond it are zero.
    scaling: None where all is zero, so that any alpha will do. module: for messages.
    """
    if scaling is None:
        return lora_rank
    for padded in range(lora_rank, 4 * lora_rank + 1):  # a power of 4 is among them
        if find_alpha(scaling, padded, use_rslora=use_rslora) is not None:
            return padded
    raise LayoutError(
        f"{module}: no lora_alpha gives a scaling of {scaling!r} with r={lora_rank}.",
        hint="Serve the shards; adapter_config.json cannot express this scaling.",
    )
