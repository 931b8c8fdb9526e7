"""The linear layers of the running engine: vLLM's objects -> LinearSizes.

vLLM copies a factor into the corner of its buffer. One that is too large raises there, after the
adapter has been registered, or loses what is beyond; one that is too small fills a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.keys import Matrix

_COLUMN = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear")
_ROW = "RowParallelLinear"
_REPLICATED = ("ReplicatedLinear", "GateLinear")


@dataclass(frozen=True, slots=True)
class LinearSizes:
    """The features of a linear layer, or of one part of a packed one, uncut by tensor parallelism.

    name: of the layer. out_features: None where vLLM does not say which rows the part has.
    exact_in, exact_out: whether a smaller factor is wrong as well; some models pad the side that
    tensor parallelism cuts.
    """

    name: str
    in_features: int
    out_features: int | None
    exact_in: bool
    exact_out: bool

    def refuses(self, matrix: Matrix, features: int) -> int | None:
        """The number of features that a factor should have, if it has another for certain."""
        expected, exact = (
            (self.in_features, self.exact_in)
            if matrix == "lora_A"
            else (self.out_features, self.exact_out)
        )
        if expected is None or features == expected or (features < expected and not exact):
            return None
        return expected


def read_linears(manager: Any) -> dict[str, LinearSizes]:
    """The linear layers of a LoRAModelManager's model, by the names of layers and of their parts.

    Only those of vLLM's own classes, whose meaning is known: a subclass may be something else.
    """
    found: dict[str, LinearSizes] = {}
    for name, wrapper in manager.modules.items():
        layer: Any = getattr(wrapper, "base_layer", None)
        kind = type(layer).__name__
        if kind not in (*_COLUMN, _ROW, *_REPLICATED):
            continue
        parts = manager.packed_modules.get(name) or (name,)
        exact = {"exact_in": kind != _ROW, "exact_out": kind == _ROW}
        # A release in which layers say it otherwise must still start.
        with suppress(AttributeError):
            for part, rows in zip(parts, _rows_of_parts(kind, layer, len(parts))):
                found[part] = LinearSizes(name, int(layer.input_size), rows, **exact)
    return found


def _rows_of_parts(kind: str, layer: Any, num_parts: int) -> Sequence[int | None]:
    """The output features of each part, in the order of the parts."""
    rows: list[int] = [int(layer.output_size)]
    if kind == "QKVParallelLinear":
        # Not its output_sizes, which count key and value heads once for each rank that has them.
        heads, kv_heads = int(layer.total_num_heads), int(layer.total_num_kv_heads)
        rows = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    elif kind == "MergedColumnParallelLinear":
        rows = [int(size) for size in layer.output_sizes]
    if num_parts == 1:
        return [sum(rows)]
    return rows if num_parts == len(rows) else [None] * num_parts
