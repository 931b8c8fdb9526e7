"""ExpertModule -> tensors of a plain PEFT adapter with a pair for each expert (L1). Pure.

And what fuse.py, which makes the fused layout, has in common with it. An output tensor is one
factor of one expert or of all, laid out along `axes` as in factors.py; its parts say which rows
and columns come from which stack of the shards. What no part fills is zero: an expert that is not
trained, the other half of a block-diagonal lora_B, padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorashard.adapter.containers import Axes
from lorashard.adapter.modules import ExpertModule, FactorStack
from lorashard.adapter.options import GateUp, Orientation
from lorashard.errors import LayoutError

PeftLayout = Literal["per_expert", "fused"]
PEFT_LAYOUTS: tuple[PeftLayout, ...] = ("per_expert", "fused")


class Span(NamedTuple):
    """Indices begin, begin + step, …: `size` of them."""

    begin: int
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns of an output factor that a stack of the shards holds, for each expert.

    The columns are [first_col, first_col + num_cols) there and the first ones in the stack.
    """

    stack: FactorStack
    rows: Span
    from_rows: Span
    first_col: int
    num_cols: int


@dataclass(frozen=True, slots=True)
class Factor:
    """lora_A [r, in] or lora_B [out, r] of an expert, and what it is made of."""

    rows: int
    cols: int
    dtype: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the new file: the factors of `experts`, its axes in the order of `axes`."""

    name: str
    shape: tuple[int, ...]
    axes: Axes
    experts: tuple[int, ...]
    factor: Factor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.factor.dtype


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """What PEFT gives one r and one alpha: an expert's projection, or a fused parameter.

    name: what its patterns are matched against. scaling: None where all is zero.
    """

    name: str
    lora_rank: int
    scaling: float | None
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be written.

    gate_up: how the base model stores gate and up rows; None = not known.
    gated: whether `gate_up` was told, not only concluded from the model's name.
    equal_inputs: the modules whose gate and up have one lora_A, expert by expert.
    dtypes: of each stack in the shards, by its name.
    model: what is known of the base model's name, class and type; may be empty.
    """

    layout: PeftLayout
    gate_up: GateUp | None
    gated: bool
    orientation: Orientation
    use_rslora: bool
    equal_inputs: frozenset[str]
    dtypes: Mapping[str, str]
    model: str


def gate_up_rows(half: int, order: GateUp) -> tuple[Span, Span]:
    """The gate's and the up projection's rows among 2 * half."""
    if order == "interleaved":
        return Span(0, 2, half), Span(1, 2, half)
    return Span(0, 1, half), Span(half, 1, half)


def fitting_alpha(scaling: float, lora_rank: int, *, use_rslora: bool) -> float | None:
    """The alpha of which PEFT makes exactly `scaling`, an integer if there is one; None if not."""
    divisor = math.sqrt(lora_rank) if use_rslora else lora_rank
    near = scaling * divisor
    candidates: list[float] = [round(near), near]
    for direction in (0.0, math.inf):
        alpha = near
        for _ in range(4):  # rounding there and back is off by less
            alpha = math.nextafter(alpha, direction)
            candidates.append(alpha)
    return next((alpha for alpha in candidates if alpha > 0 and alpha / divisor == scaling), None)


def representable_rank(
    module: ExpertModule, lora_rank: int, scaling: float | None, asked: Asked
) -> int:
    """The smallest r from `lora_rank` on with an alpha that gives exactly `scaling`.

    What is beyond `lora_rank` is zero. Nearly always `lora_rank` itself will do.
    """
    if scaling is None:
        return lora_rank
    for padded in range(lora_rank, 4 * lora_rank + 1):  # a power of 4 is among them
        if fitting_alpha(scaling, padded, use_rslora=asked.use_rslora) is not None:
            return padded
    raise LayoutError(
        f"{module.name}: no lora_alpha gives a scaling of {scaling!r} with r={lora_rank}.",
        hint="Serve the shards; adapter_config.json cannot say this scaling.",
    )
