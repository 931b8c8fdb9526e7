"""Which bytes of which files are read, and where in the region they go. Pure; `fill` does it.

In: what each layer takes (`assembly`), which files its experts are in (`rows`), and where each
tensor begins. Out: reads of at most BLOCK_BYTES, or VERBATIM_BYTES where no scratch memory is
needed, or of one expert if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lorashard.adapter.keys import Projection
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import LayoutError
from lorashard.vllm_plugin.load.assembly import Assembly, DeviceFactor, Piece, ShardStack
from lorashard.vllm_plugin.load.contents import REPLICATED, Scaling
from lorashard.vllm_plugin.load.rows import Run
from lorashard.writing.blocks import BLOCK_BYTES

_ALIGNMENT = 256
# Between two reads a thread waits for Python's lock, which the worker's main thread takes all the time.
VERBATIM_BYTES = 16 * 2**20

# ep rank of a source, tensor name -> first byte of the tensor in that source.
OffsetOf = Callable[[int, str], int]


@dataclass(frozen=True, slots=True)
class PlacedFactor:
    """A tensor for set_lora and its place: byte `offset` of the region."""

    factor: DeviceFactor
    offset: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[num_slots, rows, cols]."""
        return (self.factor.num_slots, self.factor.rows, self.factor.cols)


@dataclass(frozen=True, slots=True)
class PlacedPiece:
    """A piece of a stack, and the tensor that it becomes a part of."""

    piece: Piece
    into: PlacedFactor


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer: the tensors to fill and where its experts are read from.

    experts: global ids in slot order. runs: their slots in the rank files. scaling: per
    projection, one number or one per global expert.
    """

    name: str
    factors: tuple[PlacedFactor, ...]
    runs: tuple[Run, ...]
    experts: tuple[int, ...]
    scaling: Mapping[Projection, Scaling]


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Read `num_slots` neighbouring slots of a stack, from byte `offset` of a source.

    first_slot: the slot on the device that the first one goes to. scaling: what to multiply by:
    nothing, one number, or one per slot. is_verbatim: the bytes are those of the one tensor in
    `pieces`, so they can be read straight into it.
    """

    ep_rank: int
    offset: int
    stack: ShardStack
    first_slot: int
    num_slots: int
    scaling: Scaling | None
    pieces: tuple[PlacedPiece, ...]
    is_verbatim: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """What is read: [num_slots, rows, cols]."""
        return (self.num_slots, self.stack.rows, self.stack.cols)

    @property
    def size_bytes(self) -> int:
        """How much is read."""
        return prod(self.shape) * ELEMENT_SIZE[self.stack.dtype]

    @property
    def device_slots(self) -> slice:
        """Where it goes; a shared factor is repeated in every slot there is."""
        if self.stack.shared:
            return slice(None)
        return slice(self.first_slot, self.first_slot + self.num_slots)

    @property
    def region_offset(self) -> int:
        """The first byte of the region to write, for a verbatim job."""
        slot_bytes = self.size_bytes // self.num_slots
        return self.pieces[0].into.offset + self.first_slot * slot_bytes


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Copy bytes [begin, begin + size) of a source to byte `target` of the region."""

    ep_rank: int
    begin: int
    target: int
    size: int


def place_factors(
    assemblies: Sequence[Assembly], element_size: int, begin: int
) -> tuple[tuple[tuple[PlacedFactor, ...], ...], int]:
    """A place from byte `begin` on for each tensor of each layer, and where the last one ends."""
    end = begin
    layers = []
    for assembly in assemblies:
        placed = []
        for factor in assembly.factors:
            placed.append(PlacedFactor(factor, -(-end // _ALIGNMENT) * _ALIGNMENT))
            end = placed[-1].offset + prod(placed[-1].shape) * element_size
        layers.append(tuple(placed))
    return tuple(layers), end


def plan_copies(begin: int, end: int) -> Iterator[CopyJob]:
    """Bytes [begin, end) of the replicated source, the dense tensors, to the region's beginning."""
    for at in range(begin, end, BLOCK_BYTES):
        yield CopyJob(REPLICATED, at, at - begin, min(BLOCK_BYTES, end - at))


def plan_reads(
    layers: Sequence[LayerPlan],
    offset_of: OffsetOf,
    dtype: str,
    rearranged: Collection[str] = (),
) -> Iterator[ReadJob]:
    """Every read of every layer. dtype: of the device's LoRA buffers, a safetensors name.

    rearranged: stacks that are left to `rearrangements`.
    Raises LayoutError if the engine keeps one factor where the experts' scalings differ.
    """
    for layer in layers:
        for stack, pieces in pieces_by_stack(layer).items():
            if stack.name in rearranged:
                continue
            if stack.shared:
                yield _read_of_shared(layer, stack, pieces, offset_of, dtype)
            else:
                yield from _reads_of_experts(layer, stack, pieces, offset_of, dtype)


def pieces_by_stack(layer: LayerPlan) -> dict[ShardStack, tuple[PlacedPiece, ...]]:
    """Each stack is read once, whatever the number of tensors that it goes into."""
    pieces: dict[ShardStack, list[PlacedPiece]] = {}
    for placed in layer.factors:
        for piece in placed.factor.pieces:
            pieces.setdefault(piece.stack, []).append(PlacedPiece(piece, placed))
    return {stack: tuple(of_stack) for stack, of_stack in pieces.items()}


def _read_of_shared(
    layer: LayerPlan,
    stack: ShardStack,
    pieces: tuple[PlacedPiece, ...],
    offset_of: OffsetOf,
    dtype: str,
) -> ReadJob:
    """The factor that all experts share: one on the device as well, or repeated for each expert.

    Only the repeated one can be scaled expert by expert.
    """
    scaling = scaling_of(layer, stack)
    if pieces[0].into.factor.num_slots == 1 and len(layer.experts) != 1:
        scaling = _common_scaling(layer.name, scaling)
    return ReadJob(
        REPLICATED,
        offset_of(REPLICATED, stack.name),
        stack,
        first_slot=0,
        num_slots=1,
        scaling=scaling_of_slots(scaling, layer.experts),
        pieces=pieces,
        is_verbatim=_is_verbatim(stack, pieces, dtype),
    )


def _reads_of_experts(
    layer: LayerPlan,
    stack: ShardStack,
    pieces: tuple[PlacedPiece, ...],
    offset_of: OffsetOf,
    dtype: str,
) -> Iterator[ReadJob]:
    """The factors of this rank's experts, run by run, in blocks."""
    scaling = scaling_of(layer, stack)
    is_verbatim = _is_verbatim(stack, pieces, dtype)
    slot_bytes = stack.rows * stack.cols * ELEMENT_SIZE[stack.dtype]
    block_bytes = VERBATIM_BYTES if is_verbatim else BLOCK_BYTES
    slots_per_block = max(1, block_bytes // max(1, slot_bytes))
    for run in layer.runs:
        begin = offset_of(run.ep_rank, stack.name) + run.src_slot * slot_bytes
        for first in range(0, run.count, slots_per_block):
            num_slots = min(slots_per_block, run.count - first)
            first_slot = run.dst_slot + first
            experts = layer.experts[first_slot : first_slot + num_slots]
            yield ReadJob(
                run.ep_rank,
                begin + first * slot_bytes,
                stack,
                first_slot,
                num_slots,
                scaling_of_slots(scaling, experts),
                pieces,
                is_verbatim,
            )


def _is_verbatim(stack: ShardStack, pieces: Sequence[PlacedPiece], dtype: str) -> bool:
    return len(pieces) == 1 and stack.dtype == dtype and pieces[0].into.factor.is_verbatim


def scaling_of(layer: LayerPlan, stack: ShardStack) -> Scaling:
    """Scaling belongs into lora_B, where vLLM's `optimize` puts it."""
    return layer.scaling[stack.projection] if stack.matrix == "lora_B" else 1.0


def scaling_of_slots(scaling: Scaling, experts: Sequence[int]) -> Scaling | None:
    """What to multiply these experts' slots by; None for nothing. vLLM skips a scaling of 1 too."""
    if isinstance(scaling, tuple):
        return tuple(scaling[expert] for expert in experts)
    return None if scaling == 1 else scaling


def _common_scaling(name: str, scaling: Scaling) -> float:
    """The one scaling of a factor that the engine keeps once for all experts.

    A scaling of 0 is that of an expert without LoRA. Raises LayoutError if the others differ.
    """
    trained = {value for value in (scaling if isinstance(scaling, tuple) else (scaling,)) if value}
    if len(trained) > 1:
        raise LayoutError(
            f"{name}: the experts share a factor but not its scaling.",
            hint="Start vLLM without --enable-moe-shared-loras.",
        )
    return trained.pop() if trained else 1.0
