"""Bytes of shard files -> the tensors that set_lora takes. Threads; each byte is read once.

`make_jobs` decides (pure values), `Filler.run` does. Where a factor stands in the shard as the
device wants it, it is read straight to its place; otherwise through a block of scratch memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import prod
from typing import Any

from lorashard.adapter.keys import Projection
from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.errors import LayoutError
from lorashard.vllm_plugin.load.assembly import Assembly, Piece, Stack
from lorashard.vllm_plugin.load.contents import REPLICATED, Scaling, TensorSource
from lorashard.vllm_plugin.load.rows import Run
from lorashard.writing.blocks import BLOCK_BYTES

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class FactorPlace:
    """A tensor that set_lora takes, [num_slots, rows, cols] at a byte offset of the region."""

    offset: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer: its assembly, where the experts lie and where the factors go.

    scaling: per projection, one number or one per global expert. experts: global ids by slot.
    """

    name: str
    assembly: Assembly
    runs: tuple[Run, ...]
    experts: tuple[int, ...]
    scaling: Mapping[Projection, Scaling]
    places: tuple[FactorPlace, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A piece of a stack into one factor."""

    piece: Piece
    place: FactorPlace


@dataclass(frozen=True, slots=True)
class Job:
    """`count` neighbouring experts of one stack, to be read at once.

    scaling: what lora_B is multiplied with: nothing, one number, or one per expert of the job.
    """

    source: int
    offset: int
    stack: Stack
    dst_slot: int
    count: int
    scaling: Scaling | None
    moves: tuple[Move, ...]
    verbatim: bool


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Bytes [begin, begin + size) of a source, as they are, to `target` of the region."""

    source: int
    begin: int
    target: int
    size: int


def lay_out(
    assemblies: Sequence[Assembly], element_size: int, begin: int
) -> tuple[tuple[tuple[FactorPlace, ...], ...], int]:
    """A place for each factor of each layer from byte `begin` on, and where the last one ends."""
    offset = begin
    layers = []
    for assembly in assemblies:
        places = []
        for factor in assembly.factors:
            offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
            shape = (factor.num_slots, factor.rows, factor.cols)
            places.append(FactorPlace(offset, shape))
            offset += prod(shape) * element_size
        layers.append(tuple(places))
    return tuple(layers), offset


def make_jobs(
    layers: Sequence[LayerPlan], sources: Mapping[int, TensorSource], dtype: str
) -> Iterator[Job]:
    """Cut the reading of all layers into blocks. dtype: of the device's LoRA, safetensors name."""
    for layer in layers:
        for stack, moves in _moves(layer).items():
            verbatim = (
                len(moves) == 1
                and stack.dtype == dtype
                and layer.assembly.factors[layer.places.index(moves[0].place)].is_verbatim
            )
            scaling = layer.scaling[stack.projection] if stack.matrix == "lora_B" else 1.0
            slot_bytes = stack.rows * stack.cols * ELEMENT_SIZE[stack.dtype]
            if stack.shared:
                # One factor for all; scaled per expert only where it is spread over them.
                offset = sources[REPLICATED].offset_of(stack.name)
                alone = moves[0].place.shape[0] == 1
                if alone and len(layer.experts) != 1:
                    scaling = _one_scaling(layer.name, scaling)
                own = _own_scaling(scaling, layer.experts)
                yield Job(REPLICATED, offset, stack, 0, 1, own, moves, verbatim and alone)
                continue
            step = max(1, BLOCK_BYTES // max(1, slot_bytes))
            for run in layer.runs:
                begin = sources[run.ep_rank].offset_of(stack.name) + run.src_slot * slot_bytes
                for first in range(0, run.count, step):
                    count = min(step, run.count - first)
                    slot = run.dst_slot + first
                    own = _own_scaling(scaling, layer.experts[slot : slot + count])
                    yield Job(
                        run.ep_rank, begin + first * slot_bytes, stack, slot, count, own, moves,
                        verbatim,
                    )  # fmt: skip


def _moves(layer: LayerPlan) -> dict[Stack, tuple[Move, ...]]:
    moves: dict[Stack, list[Move]] = {}
    for factor, place in zip(layer.assembly.factors, layer.places):
        for piece in factor.pieces:
            moves.setdefault(piece.stack, []).append(Move(piece, place))
    return {stack: tuple(found) for stack, found in moves.items()}


def _own_scaling(scaling: Scaling, experts: Sequence[int]) -> Scaling | None:
    """What to multiply with; None for nothing. vLLM skips a scaling of 1 too."""
    if isinstance(scaling, tuple):
        return tuple(scaling[expert] for expert in experts)
    return None if scaling == 1 else scaling


def _one_scaling(name: str, scaling: Scaling) -> Scaling:
    """The scaling of a factor that the engine keeps once for all experts."""
    trained = {value for value in (scaling if isinstance(scaling, tuple) else (scaling,)) if value}
    if len(trained) > 1:
        raise LayoutError(
            f"{name}: the experts share a factor and differ in scaling.",
            hint="Start vLLM without --enable-moe-shared-loras.",
        )
    return trained.pop() if trained else 1.0


class Filler:
    """Carries out jobs on a region. `dtype`: of the device's LoRA, safetensors name."""

    def __init__(
        self, region: Any, sources: Mapping[int, TensorSource], dtype: str, threads: Executor
    ) -> None:
        import torch

        self._memory = memoryview(region)
        self._bytes = torch.from_numpy(region)
        self._sources = sources
        self._dtype = getattr(torch, TORCH_DTYPES[dtype])
        self._element_size = ELEMENT_SIZE[dtype]
        self._threads = threads
        self._scratch = threading.local()

    def tensor(self, place: FactorPlace) -> Any:
        """The torch tensor [num_slots, rows, cols] at a place."""
        size = prod(place.shape) * self._element_size
        view = self._bytes[place.offset : place.offset + size]
        return view.view(self._dtype).view(place.shape)

    def run(self, layers: Sequence[LayerPlan], jobs: Sequence[Job | CopyJob]) -> int:
        """Do all jobs; the number of bytes read. Raises the first error, once all have ended."""
        for layer in layers:
            for factor, place in zip(layer.assembly.factors, layer.places):
                covered = sum(piece.num_rows * piece.stack.cols for piece in factor.pieces)
                if covered != factor.rows * factor.cols:
                    self.tensor(place).zero_()
        futures = [self._threads.submit(self._do, job) for job in jobs]
        errors = [err for err in (future.exception() for future in futures) if err]
        if errors:
            raise errors[0]
        return sum(future.result() for future in futures)

    def _do(self, job: Job | CopyJob) -> int:
        source = self._sources[job.source]
        if isinstance(job, CopyJob):
            source.read_into(self._memory[job.target : job.target + job.size], job.begin)
            return job.size
        size = job.count * job.stack.rows * job.stack.cols * ELEMENT_SIZE[job.stack.dtype]
        if job.verbatim:
            begin = job.moves[0].place.offset + job.dst_slot * (size // job.count)
            source.read_into(self._memory[begin : begin + size], job.offset)
            shape = (job.count, job.stack.rows, job.stack.cols)
            values = self._bytes[begin : begin + size].view(self._dtype).view(shape)
            _scale(values, job.scaling)
        else:
            self._through_scratch(source, job, size)
        return size

    def _through_scratch(self, source: TensorSource, job: Job, size: int) -> None:
        import torch

        scratch = self._own_scratch(size)
        source.read_into(memoryview(scratch)[:size], job.offset)
        read = torch.frombuffer(scratch, dtype=torch.uint8, count=size)
        shape = (job.count, job.stack.rows, job.stack.cols)
        values = read.view(getattr(torch, TORCH_DTYPES[job.stack.dtype])).view(shape)
        values = values.to(self._dtype)
        for move in job.moves:
            piece, target = move.piece, self.tensor(move.place)
            rows = slice(
                piece.dst_row, piece.dst_row + (piece.num_rows - 1) * piece.dst_step + 1,
                piece.dst_step,
            )  # fmt: skip
            cols = slice(piece.dst_col, piece.dst_col + piece.stack.cols)
            slots = (
                slice(None) if job.stack.shared else slice(job.dst_slot, job.dst_slot + job.count)
            )
            last = piece.src_row + (piece.num_rows - 1) * piece.src_step + 1
            part = target[slots, rows, cols]
            part.copy_(values[:, piece.src_row : last : piece.src_step])
            _scale(part, job.scaling)

    def _own_scratch(self, size: int) -> bytearray:
        held: bytearray | None = getattr(self._scratch, "buffer", None)
        if held is None or len(held) < size:
            self._scratch.buffer = held = bytearray(max(size, BLOCK_BYTES))
        return held


def _scale(values: Any, scaling: Scaling | None) -> None:
    """Multiply [slots, rows, cols] in place, in its own dtype, as vLLM's `optimize` does
    (0.33.0 lora_weights.py:37): so the bits are those of vLLM.
    """
    if scaling is None:
        return
    if not isinstance(scaling, tuple):
        values.mul_(scaling)
        return
    import torch

    values.mul_(torch.tensor(scaling, dtype=torch.float32).view(len(scaling), 1, 1))
