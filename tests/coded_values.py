"""Values that name their own place, as integers that hold the bits.

`coded` values name their layer, expert, projection, matrix and position: exactly in F32 and F64,
up to collisions in 16 bits. `random` ones are finite. `bits` are any bits, NaN payloads included.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Fill = Literal["coded", "random", "bits"]


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers; comparing these tells -0.0 from 0.0, and NaN payloads apart."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


class Values:
    """Matrices as integers that hold the bits of the values."""

    def __init__(self, dtype: torch.dtype, fill: Fill, seed: int) -> None:
        self._dtype, self._fill = dtype, fill
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, layer: int, expert: int, number: int, rows: int, cols: int) -> Tensor:
        """number: 2 * projection + matrix, at least 8 for what no expert owns."""
        dtype = self._dtype
        integers = INTEGERS[dtype.itemsize]
        if self._fill == "coded":
            place = (layer * 16 + expert) * 24 + number  # < 1.6e4 for 41 layers of 16 experts
            code = place * 1024 + torch.arange(rows * cols).view(rows, cols) + 1
            if dtype.itemsize > 2:
                return code.to(dtype).view(integers)
            # A prime below the bits of F16's infinity; one below that of F8_E4M3's NaN.
            return (code * 8191 % (31_741 if dtype.itemsize == 2 else 113)).to(integers)
        if self._fill == "random":
            return torch.randn(rows, cols, generator=self._generator).to(dtype).view(integers)
        raw = torch.randint(0, 256, (rows * cols * dtype.itemsize,), generator=self._generator)
        found = raw.to(torch.uint8).view(integers).view(rows, cols).clone()
        if not found.numel():
            return found
        nan = torch.tensor(float("nan")).to(dtype).view(integers)
        found.view(-1)[0] = nan | 1  # a payload that arithmetic would lose
        found.view(-1)[-1] = torch.tensor(-0.0).to(dtype).view(integers)
        return found
