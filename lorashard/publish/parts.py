"""What each rank has of an adapter's tensors -> which tensors there are, and who writes what. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of one tensor: the indices [begin, end) along an axis.

    name: as PEFT saves it. dtype: as safetensors names it. shape: of the whole tensor.
    is_copy: other ranks have the same; the first of them writes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    begin: int
    end: int
    is_copy: bool = False

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(offset in the tensor, length) in bytes of what is contiguous in it, in order."""
        if not self.shape:
            return ((0, ELEMENT_SIZE[self.dtype]),)
        inner = prod(self.shape[self.axis + 1 :]) * ELEMENT_SIZE[self.dtype]
        stride, length = self.shape[self.axis] * inner, (self.end - self.begin) * inner
        count = prod(self.shape[: self.axis])
        if length == stride:
            return ((0, length * count),)
        return tuple((i * stride + self.begin * inner, length) for i in range(count))


@dataclass(frozen=True, slots=True)
class JoinedParts:
    """The tensors of the adapter, by name: dtype and shape. writers: of each copy, the rank."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    writers: Mapping[str, int]


def join_parts(parts: Sequence[Sequence[Part]]) -> JoinedParts:
    """What the ranks have together. parts: of each rank.

    Raises LayoutError, which names the tensor, for what two ranks have, or none has.
    """
    by_name: dict[str, list[tuple[int, Part]]] = {}
    for rank, own in enumerate(parts):
        for part in own:
            by_name.setdefault(part.name, []).append((rank, part))
    tensors, writers = {}, {}
    for name, held in by_name.items():
        first = held[0][1]
        for rank, part in held[1:]:
            if (part.dtype, part.shape) != (first.dtype, first.shape):
                raise LayoutError(
                    f"{name}: rank {held[0][0]} has it as {first.dtype} {list(first.shape)}, rank "
                    f"{rank} as {part.dtype} {list(part.shape)}.",
                    hint="Cast the adapter to one dtype before it is written.",
                )
        is_copied = all(part.is_copy for _, part in held)
        if is_copied:
            writers[name] = held[0][0]
        _check_covered(name, held[:1] if is_copied else held)
        tensors[name] = (first.dtype, first.shape)
    return JoinedParts(tensors, writers)


def _check_covered(name: str, held: Sequence[tuple[int, Part]]) -> None:
    """Raise LayoutError unless the parts tile the tensor."""
    (first_rank, first), *_ = held
    if len({part.axis for _, part in held}) > 1:
        raise LayoutError(
            f"{name}: the ranks have parts of it along different axes.",
            hint="Give the writer parts along one axis.",
        )
    size = first.shape[first.axis] if first.shape else 1
    reached, before = 0, first_rank
    for begin, end, rank in sorted((part.begin, part.end, rank) for rank, part in held):
        if begin == end:
            continue
        if begin < reached:
            raise LayoutError(
                f"{name}: ranks {before} and {rank} both have index {begin} of axis {first.axis}.",
                hint="Give each tensor to the writer on one rank, once.",
            )
        if begin > reached:
            break
        reached, before = end, rank
    if reached < size:
        raise LayoutError(
            f"{name}: no rank has index {reached} of axis {first.axis} ({size} in all).",
            hint="Every part of a tensor must be given to the writer, on some rank.",
        )
