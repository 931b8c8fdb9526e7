"""The tensors of a plain PEFT adapter as values: their names and shapes, and where their bytes are.

An output tensor is one factor of one expert or of all, its axes in an order as in
adapter/containers.py; its parts say which rows and columns come from which stack of the shards.
What no part fills is zero: an expert that is not trained, the other half of a block-diagonal
lora_B, padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorashard.adapter.containers import Axes
from lorashard.adapter.modules import FactorStack


@dataclass(frozen=True, slots=True)
class StackPart:
    """Rows and columns of an output factor that are copied from a stack, for each expert.

    rows, cols: where they go in the output factor.
    stack_rows: where they come from in the stack, as many as `rows`. Its columns are the first ones.
    """

    stack: FactorStack
    rows: range
    stack_rows: range
    cols: range

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.stack_rows), self
        assert self.cols.step == 1, self


@dataclass(frozen=True, slots=True)
class OutputFactor:
    """lora_A [r, in] or lora_B [out, r] of an expert, and what it is made of.

    dtype: as safetensors names it.
    """

    rows: int
    cols: int
    dtype: str
    parts: tuple[StackPart, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the new file: the factors of `experts`, its axes in the order of `axes`."""

    name: str
    shape: tuple[int, ...]
    axes: Axes
    experts: tuple[int, ...]
    factor: OutputFactor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.factor.dtype


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """What PEFT gives one r and one alpha: an expert's projection, or a fused parameter.

    name: what PEFT matches its patterns against. scaling: None where all is zero.
    """

    name: str
    lora_rank: int
    scaling: float | None
    tensors: tuple[OutputTensor, ...]


def whole_stack(stack: FactorStack, *, first_row: int = 0) -> StackPart:
    """All of a stack, from row `first_row` of the output factor on."""
    rows = range(first_row, first_row + stack.rows)
    return StackPart(stack, rows, range(stack.rows), range(stack.cols))
