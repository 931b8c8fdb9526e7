"""The two sides of a comparison: the source's tensors, and a tensor of a shard file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from lorashard.verify.reference.files import PickledTensors, SafetensorsFile
from lorashard.verify.reference.values import Bits, cast_bits, is_cast


@dataclass(frozen=True, slots=True)
class Source:
    """The source's tensors, with their values cast if the shards' were.

    cast: torch's name of a dtype. progress: called with the bytes of the source that were compared.
    """

    tensors: SafetensorsFile | PickledTensors
    num_experts: int
    cast: str | None
    progress: Callable[[int], None]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in the shards, by torch's name."""
        dtype = self.tensors.dtypes[name]
        return self.cast if self.cast is not None and is_cast(dtype, self.cast) else dtype

    def read_into(self, name: str, begin: int, out: Bits) -> None:
        """Fill `out` with the elements of a tensor from `begin` on."""
        dtype = self.tensors.dtypes[name]
        if self.cast is None or not is_cast(dtype, self.cast):
            self.tensors.read_into(name, begin, out)
            return
        bits = np.empty(out.shape, f"u{self.tensors.item_sizes[name]}")
        self.tensors.read_into(name, begin, bits)
        out[:] = cast_bits(bits, dtype, self.cast)

    def advance(self, name: str, num_elements: int) -> None:
        """Report that so many elements of a tensor were compared, for the first time."""
        self.progress(num_elements * self.tensors.item_sizes[name])


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor of a shard file. `experts`: which expert each slot holds, None = all of them."""

    file: SafetensorsFile
    name: str
    experts: tuple[int | None, ...]
    matrix_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it must have."""
        return (len(self.experts), *self.matrix_shape)

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return self.file.item_sizes[self.name]

    def read_into(self, slot: int, begin: int, out: Bits) -> None:
        """Fill `out` with elements of the matrix in a slot, from `begin` on."""
        self.file.read_into(self.name, slot * prod(self.matrix_shape) + begin, out)
