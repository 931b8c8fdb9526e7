"""A plain PEFT adapter, sliced in memory by the same plan as `lorashard split`.

What the plan would write to `replicated.safetensors` and to this rank's file goes into memory
instead; nothing of other ranks is kept, and what is per expert is not even read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.adapter.keys import ExpertKey, parse_key
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import AdapterSource, opened_adapter
from lorashard.errors import AdapterError
from lorashard.header import TensorEntry
from lorashard.shards.placement import Placement
from lorashard.shards.plan import FilePlan, build_plan
from lorashard.storage.local import ByteSource
from lorashard.storage.safetensors_file import read_header
from lorashard.vllm_plugin.load.assembly import Stack
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents, ModuleContents
from lorashard.writing.blocks import Block, CopyBlock, split_into_blocks
from lorashard.writing.rearrange import rearrange_block, scratch_bytes

_KEPT_FILES = 2  # of the plan: replicated, this rank; the third is everybody else's

# Module of the adapter -> the global experts that this rank holds of it, in slot order.
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

    options: what the model says about its experts. take: gives so many bytes of memory, of any
    content, for as long as the contents are held. Raises AdapterError.
    """
    source = open_with_experts(path, stack)
    if source is None:
        return None
    layout = detect_layout(source.index, options, str(path))
    placement = _own_and_rest(layout, local_experts)
    plan = build_plan(layout, placement, None)
    weights = stack.enter_context(source.opened())
    images = _images(plan.files[:_KEPT_FILES], take)
    for zero in plan.zeros:
        if zero.target.file < _KEPT_FILES:
            begin = zero.target.offset
            images[zero.target.file].bytes[begin : begin + zero.size_bytes] = 0
    blocks = [block for block in split_into_blocks(plan.reads) if _is_kept(block)]
    list(threads.map(lambda block: _read_block(block, weights, images), blocks))
    return AdapterContents(
        source.index.config,
        layout.num_experts,
        gate_up_known=True,
        modules=module_contents(layout, placement),
        dense=_dense(plan.files[0], layout),
        sources={REPLICATED: images[0], 0: images[1]},
    )


def open_with_experts(path: Path, stack: ExitStack) -> AdapterSource | None:
    """Read an adapter's config and header; None if no tensor is an expert's.

    An adapter without experts is vLLM's own to load or to refuse, whatever may be wrong with it.
    Raises AdapterError.
    """
    try:
        # vLLM reads adapter_model.bin with weights_only=True, so a pickle is taken here too.
        source = stack.enter_context(opened_adapter(path, allow_pickle=True))
    except AdapterError:
        weights_path = path / WEIGHTS_NAME
        if weights_path.is_file() and not _has_experts(read_header(weights_path)[1].tensors):
            return None
        raise
    return source if _has_experts(source.index.tensors) else None


def _has_experts(tensors: Sequence[TensorEntry]) -> bool:
    """Whether a tensor is an expert's, or at least calls itself so."""
    return any(
        "experts" in entry.name.split(".")
        or isinstance(parse_key(entry.name, len(entry.shape)), ExpertKey)
        for entry in tensors
    )


def _own_and_rest(layout: AdapterLayout, local_experts: LocalExperts) -> Placement:
    """A placement of two ranks: what is local here, and everything else."""
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
                Stack(s.name, s.projection, s.matrix, s.dtype, s.rows, s.cols, s.shared)
                for s in module.stacks
            ),
            placement.ranks_of(module.name)[:1],
        )
        for module in layout.modules
    )


def _dense(file: FilePlan, layout: AdapterLayout) -> tuple[TensorEntry, ...]:
    """What every rank needs, with its place in the image; shared factors are stacks."""
    names = {entry.name for entry in layout.replicated}
    return tuple(entry for entry in file.tensors if entry.name in names)


def _is_kept(block: Block) -> bool:
    if isinstance(block, CopyBlock):
        return any(t.file < _KEPT_FILES for copy in block.copies for t in copy.targets)
    first, last = (block.first, block.last) if block.op.axes[0] == "e" else (0, None)
    return any(t.file < _KEPT_FILES for targets in block.op.targets[first:last] for t in targets)


@dataclass(frozen=True, slots=True)
class _Image:
    """A file of the plan in memory: a TensorSource. bytes: a numpy array of uint8."""

    bytes: Any
    offsets: Mapping[str, int]

    def offset_of(self, name: str) -> int:
        return self.offsets[name]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.at(offset, len(buffer))

    def at(self, offset: int, size: int) -> memoryview:
        return memoryview(self.bytes)[offset : offset + size]


def _images(files: Sequence[FilePlan], take: Callable[[int], Any]) -> list[_Image]:
    memory = take(sum(file.size_bytes for file in files))
    images, begin = [], 0
    for file in files:
        offsets = {entry.name: entry.begin for entry in file.tensors}
        images.append(_Image(memory[begin : begin + file.size_bytes], offsets))
        begin += file.size_bytes
    return images


def _read_block(block: Block, source: ByteSource, images: Sequence[_Image]) -> None:
    if isinstance(block, CopyBlock):
        for copy in block.copies:
            for target in (target for target in copy.targets if target.file < _KEPT_FILES):
                place = images[target.file].at(target.offset, copy.end - copy.begin)
                source.read_into(place, copy.begin)
        return
    data = memoryview(bytearray(block.end - block.begin))
    source.read_into(data, block.begin)
    for targets, view in rearrange_block(block, data, memoryview(bytearray(scratch_bytes(block)))):
        for target in (target for target in targets if target.file < _KEPT_FILES):
            images[target.file].at(target.offset, len(view))[:] = view
