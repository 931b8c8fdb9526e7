"""A plain PEFT adapter -> AdapterContents, sliced by the plan of `lorashard split`.

What the plan would write to `replicated.safetensors` and to this rank's file is read when it is
asked for, if it needs no rearranging, and otherwise written into memory here. Other ranks' experts
are dropped, or not read at all where each has tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.adapter.keys import ExpertKey, LoraKey, is_unsloth_alias, parse_key
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import AdapterSource, opened_adapter
from lorashard.errors import AdapterError
from lorashard.header import TensorEntry
from lorashard.shards.placement import Placement
from lorashard.shards.plan import CopyRange, FilePlan, ReadOp, ShardPlan, Target, build_plan
from lorashard.storage.buffers import ThreadBuffer
from lorashard.storage.local import ByteSource
from lorashard.storage.safetensors_file import read_header
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents, ModuleContents
from lorashard.vllm_plugin.load.planned_file import PlannedFile, planned_file
from lorashard.writing.blocks import Block, CopyBlock, split_into_blocks
from lorashard.writing.rearrange import LARGE_TILE_BYTES, rearrange_block, scratch_bytes

_OWN_FILES = 2  # of the plan's three: the replicated one and this rank's, but not the others'

# A module of the adapter -> this rank's global experts of it, in slot order.
LocalExperts = Callable[[str], tuple[int, ...]]


def open_plain_adapter(
    path: Path,
    options: LayoutOptions,
    local_experts: LocalExperts,
    stack: ExitStack,
    threads: Executor,
    take: Callable[[int], Any],
) -> AdapterContents | None:
    """Read what this rank needs of a PEFT adapter; None if it has no expert weights.

    options: what the model says about its experts. take: returns an array of so many bytes, with
    any content, that is in use as long as the array is referenced. Raises AdapterError.
    """
    source = open_with_experts(path, stack)
    if source is None:
        return None
    layout = detect_layout(source.index, options, str(path))
    placement = _own_and_other_experts(layout, local_experts)
    plan = build_plan(layout, placement, None)
    weights = stack.enter_context(source.opened())
    return AdapterContents(
        source.index.config,
        layout.num_experts,
        gate_up_known=True,
        modules=module_contents(layout, placement),
        dense=_dense(plan.files[0], layout),
        sources=_sources(plan, weights, threads, take),
        version=blake3(source.config_bytes + source.header).hexdigest(),
    )


def open_with_experts(path: Path, stack: ExitStack) -> AdapterSource | None:
    """Read an adapter's config and header; None if no tensor is an expert's.

    vLLM itself loads, or refuses, an adapter without experts, whatever may be wrong with it.
    Raises AdapterError.
    """
    try:
        # vLLM accepts adapter_model.bin (with weights_only=True), so pickles are allowed here too.
        source = stack.enter_context(opened_adapter(path, allow_pickle=True))
    except AdapterError:
        weights_path = path / WEIGHTS_NAME
        if weights_path.is_file() and not has_experts(read_header(weights_path)[1].tensors):
            return None
        raise
    return source if has_experts(source.index.tensors) else None


def has_experts(tensors: Sequence[TensorEntry]) -> bool:
    """Whether any tensor is an expert's, or at least has a name that says so."""
    return any(_names_experts(entry) for entry in tensors)


def _names_experts(entry: TensorEntry) -> bool:
    if "experts" in entry.name.split("."):
        return True
    key = parse_key(entry.name, len(entry.shape))
    return isinstance(key, ExpertKey) or (isinstance(key, LoraKey) and is_unsloth_alias(key.module))


def _own_and_other_experts(layout: AdapterLayout, local_experts: LocalExperts) -> Placement:
    """A placement on two ranks: the experts of this rank, and all others."""
    layers = {}
    for module in layout.modules:
        own = local_experts(module.name)
        others = set(range(layout.num_experts)) - set(own)
        layers[module.name] = (own, tuple(sorted(others)))
    return Placement("explicit", layout.num_experts, next(iter(layers.values())), layers)


def module_contents(layout: AdapterLayout, placement: Placement) -> tuple[ModuleContents, ...]:
    """What rank 0 of a placement gets of each experts container, as one rank file has it."""
    return tuple(
        ModuleContents(
            module.name,
            module.gate_up,
            module.scaling,
            tuple(
                ShardStack(s.name, s.projection, s.matrix, s.dtype, s.rows, s.cols, s.shared)
                for s in module.stacks
            ),
            placement.ranks_of(module.name)[:1],
        )
        for module in layout.modules
    )


def _dense(file: FilePlan, layout: AdapterLayout) -> tuple[TensorEntry, ...]:
    """The replicated tensors beside the experts, as they are in the image."""
    names = layout.replicated_names
    return tuple(entry for entry in file.tensors if entry.name in names)


def _own_reads(plan: ShardPlan) -> list[ReadOp]:
    """The reads of the plan, with the targets of this rank alone."""

    def own(targets: tuple[Target, ...]) -> tuple[Target, ...]:
        return tuple(target for target in targets if target.file < _OWN_FILES)

    return [
        replace(op, targets=own(op.targets))
        if isinstance(op, CopyRange)
        else replace(op, targets=tuple(map(own, op.targets)))
        for op in plan.reads
    ]


def _is_needed(block: Block) -> bool:
    """Whether this rank has a target in it."""
    if isinstance(block, CopyBlock):
        return any(copy.targets for copy in block.copies)
    first, last = (block.first, block.last) if block.op.axes[0] == "e" else (0, None)
    return any(block.op.targets[first:last])


@dataclass(frozen=True, slots=True)
class _Image:
    """A file of the plan in memory: a ByteSource. bytes: a numpy array of uint8."""

    bytes: Any
    offsets: Mapping[str, int]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.at(offset, len(buffer))

    def at(self, offset: int, size: int) -> memoryview:
        return memoryview(self.bytes)[offset : offset + size]


@dataclass(frozen=True, slots=True)
class _PlainSources:
    """The RankSources of a plain adapter: this rank's experts are those of rank 0."""

    replicated: _Image | PlannedFile
    own: _Image | PlannedFile

    def offset_of(self, ep_rank: int, name: str) -> int:
        return self.source_of(ep_rank).offsets[name]

    def source_of(self, ep_rank: int) -> _Image | PlannedFile:
        return {REPLICATED: self.replicated, 0: self.own}[ep_rank]


def _sources(
    plan: ShardPlan, weights: ByteSource, threads: Executor, take: Callable[[int], Any]
) -> _PlainSources:
    """The replicated file and this rank's, in memory if something has to be rearranged."""
    replicated, own = (planned_file(plan, number, weights) for number in range(_OWN_FILES))
    if replicated is not None and own is not None:
        return _PlainSources(replicated, own)
    images = _images(plan.files[:_OWN_FILES], take)
    for zero in plan.zeros:
        if zero.target.file < _OWN_FILES:
            begin = zero.target.offset
            images[zero.target.file].bytes[begin : begin + zero.size_bytes] = 0
    blocks = [block for block in split_into_blocks(_own_reads(plan)) if _is_needed(block)]
    data, scratch = ThreadBuffer(), ThreadBuffer()
    list(threads.map(lambda block: _read_block(block, weights, images, data, scratch), blocks))
    return _PlainSources(*images)


def _images(files: Sequence[FilePlan], take: Callable[[int], Any]) -> list[_Image]:
    memory = take(sum(file.size_bytes for file in files))
    images, begin = [], 0
    for file in files:
        offsets = {entry.name: entry.begin for entry in file.tensors}
        images.append(_Image(memory[begin : begin + file.size_bytes], offsets))
        begin += file.size_bytes
    return images


def _read_block(
    block: Block,
    source: ByteSource,
    images: Sequence[_Image],
    data: ThreadBuffer,
    scratch: ThreadBuffer,
) -> None:
    if isinstance(block, CopyBlock):
        for copy in block.copies:
            for target in copy.targets:
                memory = images[target.file].at(target.offset, copy.end - copy.begin)
                source.read_into(memory, copy.begin)
        return
    read = data.get(block.end - block.begin)
    source.read_into(read, block.begin)
    slots = scratch.get(scratch_bytes(block))
    for targets, view in rearrange_block(block, read, slots, tile_bytes=LARGE_TILE_BYTES):
        for target in targets:
            images[target.file].at(target.offset, len(view))[:] = view
