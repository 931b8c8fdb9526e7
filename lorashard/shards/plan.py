"""AdapterLayout x Placement -> ShardPlan: every byte of every output file, before one is written.

Pure values, so that the invariants can be tested without a disk (tests/shards/test_plan.py): the
destinations of a file tile it without hole or overlap, and each source byte is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter

from lorashard.adapter.containers import Axes, SourceFactor
from lorashard.adapter.keys import clean_name
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import FactorStack
from lorashard.dtypes import ELEMENT_SIZE, FLOAT_DTYPES
from lorashard.errors import PlacementError, ShardError
from lorashard.header import TensorEntry, build_header
from lorashard.shards.names import REPLICATED_NAME, rank_file_name
from lorashard.shards.placement import Placement


@dataclass(frozen=True, slots=True)
class Target:
    """A place in an output file: index into ShardPlan.files, bytes from the start of the file."""

    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Copy source bytes [begin, end) verbatim to each target."""

    begin: int
    end: int
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Turn a source tensor's axes to [expert, row, col] and put each expert into its slots.

    The source bytes [begin, end) are a row-major tensor with axes in the order `axes`. A slot is
    [slot_rows, slot_cols]; what the factor does not fill (a smaller r) is zero.
    targets[i] are the slots of the i-th expert along axis e.
    """

    begin: int
    end: int
    axes: Axes
    rows: int
    cols: int
    slot_rows: int
    slot_cols: int
    source_dtype: str
    dtype: str
    targets: tuple[tuple[Target, ...], ...]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert's slot."""
        return self.slot_rows * self.slot_cols * ELEMENT_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class ZeroFill:
    """Bytes that no source fills: an expert that is not trained, the rest of a smaller r."""

    target: Target
    size_bytes: int


ReadOp = CopyRange | Rearrange


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file. `header` is its bytes up to the data; `tensors` are in file order."""

    name: str
    header: bytes
    size_bytes: int
    tensors: tuple[TensorEntry, ...]

    @property
    def begins(self) -> dict[str, int]:
        """Tensor name -> its first byte, from the start of the file."""
        return {entry.name: entry.begin for entry in self.tensors}


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """files[0] is the replicated file, files[1 + k] that of ep rank k.

    `reads` are in source order and cover each byte of each non-empty tensor exactly once.
    """

    files: tuple[FilePlan, ...]
    reads: tuple[ReadOp, ...]
    zeros: tuple[ZeroFill, ...]


def build_plan(layout: AdapterLayout, placement: Placement, dtype: str | None) -> ShardPlan:
    """Decide every byte. dtype: safetensors name to cast every float tensor to, or None.

    Raises PlacementError if the placement is for another number of experts.
    """
    if placement.num_experts != layout.num_experts:
        raise PlacementError(
            f"The placement is for {placement.num_experts} experts, the adapter has "
            f"{layout.num_experts}."
        )
    files = _plan_files(layout, placement, dtype)
    begins = [file.begins for file in files]
    reads: list[ReadOp] = []
    zeros: list[ZeroFill] = []
    for entry in layout.replicated:
        target = Target(0, begins[0][clean_name(entry.name)])
        reads.extend(_whole_tensor(entry, target, _cast(entry.dtype, dtype)))
    for module in layout.modules:
        ranks = placement.ranks_of(module.name)
        for stack in module.stacks:
            cast = _cast(stack.dtype, dtype)
            if stack.shared:
                target = Target(0, begins[0][stack.name])
                reads.extend(_whole_tensor(stack.sources[0].entry, target, cast))
            else:
                slots = expert_slots(stack, ranks, begins, cast)
                zeros.extend(_untrained_slots(stack, slots, cast))
                for source in stack.sources:
                    _plan_source(source, stack, slots, cast, reads, zeros)
    reads.sort(key=attrgetter("begin"))
    return ShardPlan(files, tuple(merge_copies(reads)), tuple(zeros))


def _plan_files(
    layout: AdapterLayout, placement: Placement, dtype: str | None
) -> tuple[FilePlan, ...]:
    replicated = [(clean_name(e.name), _cast(e.dtype, dtype), e.shape) for e in layout.replicated]
    per_rank: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in placement.ranks]
    for module in layout.modules:
        ranks = placement.ranks_of(module.name)
        for stack in module.stacks:
            cast = _cast(stack.dtype, dtype)
            if stack.shared:
                replicated.append((stack.name, cast, (1, stack.rows, stack.cols)))
                continue
            for tensors, experts in zip(per_rank, ranks):
                tensors.append((stack.name, cast, (len(experts), stack.rows, stack.cols)))
    _refuse_name_clash(replicated)
    ep_size = placement.ep_size
    plans = [_plan_file(REPLICATED_NAME, replicated, {"format": "pt"})]
    for ep_rank, tensors in enumerate(per_rank):
        metadata = {"format": "pt", "ep_rank": str(ep_rank), "ep_size": str(ep_size)}
        plans.append(_plan_file(rank_file_name(ep_rank, ep_size), tensors, metadata))
    return tuple(plans)


def _refuse_name_clash(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
    names = [name for name, _, _ in tensors]
    if len(set(names)) != len(names):
        clash = next(name for name in names if names.count(name) > 1)
        raise ShardError(
            f"Two tensors would be called {clash} in {REPLICATED_NAME}.",
            hint="Rename the one in the adapter that is not an expert factor.",
        )


def _plan_file(
    name: str,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> FilePlan:
    header, entries = build_header(tensors, metadata)
    return FilePlan(name, header, entries[-1].end if entries else len(header), entries)


def _cast(dtype: str, wanted: str | None) -> str:
    """Only floats of LoRA's kind are cast; a flag, an index, or a scale in F8_E8M0 keeps its type."""
    return wanted if wanted is not None and dtype in FLOAT_DTYPES else dtype


def _whole_tensor(entry: TensorEntry, target: Target, dtype: str) -> Iterator[ReadOp]:
    if entry.size_bytes == 0:
        return
    if entry.dtype == dtype:
        yield CopyRange(entry.begin, entry.end, (target,))
        return
    cols = entry.shape[-1] if entry.shape else 1
    rows = prod(entry.shape) // cols
    yield Rearrange(
        entry.begin, entry.end, "rec", rows, cols, rows, cols, entry.dtype, dtype, ((target,),)
    )


def expert_slots(
    stack: FactorStack,
    ranks: Sequence[Sequence[int]],
    begins: Sequence[Mapping[str, int]],
    dtype: str,
) -> dict[int, tuple[Target, ...]]:
    """Expert -> its places in the rank files, in rank order; several for a redundant expert.

    begins: per file, where each tensor begins. dtype: that of the stack in the files.
    """
    slot_bytes = stack.rows * stack.cols * ELEMENT_SIZE[dtype]
    slots: dict[int, tuple[Target, ...]] = {}
    for ep_rank, experts in enumerate(ranks):
        offset = begins[1 + ep_rank][stack.name]
        for expert in experts:
            target = Target(1 + ep_rank, offset)
            slots[expert] = (*slots[expert], target) if expert in slots else (target,)
            offset += slot_bytes
    return slots


def _untrained_slots(
    stack: FactorStack, slots: Mapping[int, tuple[Target, ...]], dtype: str
) -> Iterator[ZeroFill]:
    slot_bytes = stack.rows * stack.cols * ELEMENT_SIZE[dtype]
    for expert in sorted(set(slots).difference(stack.experts)):
        for target in slots[expert]:
            yield ZeroFill(target, slot_bytes)


def _plan_source(
    source: SourceFactor,
    stack: FactorStack,
    slots: Mapping[int, tuple[Target, ...]],
    dtype: str,
    reads: list[ReadOp],
    zeros: list[ZeroFill],
) -> None:
    """Add the ops of one source tensor: byte ranges where those suffice, else one Rearrange."""
    assert source.experts is not None
    entry = source.entry
    if entry.size_bytes == 0:
        return  # r=0: the slots are zero, as those of any expert that is not trained
    targets = tuple(map(slots.__getitem__, source.experts))
    padded = source.cols != stack.cols
    if source.axes != "erc" or padded or entry.dtype != dtype:
        # One expert's [row, col] is also [row, expert, col], which blocks of rows can run through.
        axes: Axes = "rec" if source.axes == "erc" and len(targets) == 1 else source.axes
        reads.append(
            Rearrange(
                entry.begin, entry.end, axes, source.rows, source.cols,
                stack.rows, stack.cols, entry.dtype, dtype, targets,
            )
        )  # fmt: skip
        return
    size = source.rows * source.cols * ELEMENT_SIZE[dtype]
    rest = (stack.rows - source.rows) * stack.cols * ELEMENT_SIZE[dtype]
    begin = entry.begin
    for expert_targets in targets:
        reads.append(CopyRange(begin, begin + size, expert_targets))
        begin += size
        if rest:
            zeros.extend(ZeroFill(Target(t.file, t.offset + size), rest) for t in expert_targets)


def merge_copies(reads: Sequence[ReadOp]) -> Iterator[ReadOp]:
    """Join copies that are neighbours in the source and, target by target, in the output."""
    pending: CopyRange | None = None
    for op in reads:
        if not isinstance(op, CopyRange):
            if pending:
                yield pending
            pending = None
            yield op
        elif pending and _continues(pending, op):
            pending = CopyRange(pending.begin, op.end, pending.targets)
        else:
            if pending:
                yield pending
            pending = op
    if pending:
        yield pending


def _continues(first: CopyRange, second: CopyRange) -> bool:
    if first.end != second.begin or len(first.targets) != len(second.targets):
        return False
    size = first.end - first.begin
    for a, b in zip(first.targets, second.targets):
        if a.offset + size != b.offset or a.file != b.file:
            return False
    return True
