"""Carries out the reads that `reads` planned: bytes of shard files -> tensors for set_lora.

Where the bytes in the shard are those that the device wants they are read straight into place,
otherwise through a block of scratch memory. Many threads; each byte is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from math import prod
from typing import Any

from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.storage.buffers import ThreadBuffer
from lorashard.storage.local import ByteSource
from lorashard.vllm_plugin.load.contents import RankSources, Scaling
from lorashard.vllm_plugin.load.reads import CopyJob, LayerPlan, PlacedFactor, ReadJob
from lorashard.vllm_plugin.load.rearrangements import RearrangeJob
from lorashard.writing.rearrange import copy_in_tiles

Job = ReadJob | CopyJob | RearrangeJob


class Filler:
    """Fills one region. `dtype`: of the device's LoRA buffers, a safetensors name.

    bytes: the region as a torch tensor, uint8.
    """

    def __init__(self, region: Any, sources: RankSources, dtype: str, threads: Executor) -> None:
        import torch

        self._memory = memoryview(region)
        self.bytes = torch.from_numpy(region)
        self._sources = sources
        self._dtype = _torch_dtype(dtype)
        self._element_size = ELEMENT_SIZE[dtype]
        self._threads = threads
        self._scratch, self._ordered = ThreadBuffer(), ThreadBuffer()

    def tensor(self, placed: PlacedFactor, copy: Any = None) -> Any:
        """The torch tensor [num_slots, rows, cols] of a factor: a view of the region, or of a copy."""
        size = prod(placed.shape) * self._element_size
        memory = self.bytes if copy is None else copy
        view = memory[placed.offset : placed.offset + size]
        return view.view(self._dtype).view(placed.shape)

    def run(
        self,
        layers: Sequence[LayerPlan],
        jobs: Sequence[Job],
        follow: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Do all jobs and zero what none of them fills; the number of bytes read.

        follow: called in the jobs' order, with how many of them are done, all that come before as well.
        Raises the first error, once no thread writes to the region any more.
        """
        for layer in layers:
            for placed in layer.factors:
                if not placed.factor.is_covered:
                    self.tensor(placed).zero_()
        # Opened by this thread, before the others share them.
        sources = {rank: self._sources.source_of(rank) for rank in {j.ep_rank for j in jobs}}
        futures: list[Future[int]] = []
        errors: list[BaseException] = []
        try:
            # `extend` keeps what was submitted before an error.
            futures.extend(self._threads.submit(self._do, j, sources[j.ep_rank]) for j in jobs)
            errors.extend(_errors_of(futures, follow))
            if errors:
                raise errors[0]
            return sum(future.result() for future in futures)
        finally:
            wait(futures)
            # An error and the frame that it passed through hold each other, and this frame holds
            # the region: without the cycle the region is free again as soon as the error is gone.
            del futures, errors

    def copy_slots(self, layer: LayerPlan, copies: Sequence[tuple[int, int]]) -> None:
        """Fill slots from others of the layer: pairs (slot, the one that has the same expert)."""
        for placed in layer.factors if copies else ():
            if placed.factor.num_slots == len(layer.experts):
                tensor = self.tensor(placed)
                for slot, first in copies:
                    tensor[slot].copy_(tensor[first])

    def _do(self, job: Job, source: ByteSource) -> int:
        if isinstance(job, CopyJob):
            source.read_into(self._memory[job.target : job.target + job.size], job.begin)
            return job.size
        if isinstance(job, RearrangeJob):
            self._rearrange(job, source)
        elif job.is_verbatim:
            self._read_verbatim(job, source)
        else:
            self._read_through_scratch(job, source)
        return job.size_bytes

    def _read_verbatim(self, job: ReadJob, source: ByteSource) -> None:
        begin, end = job.region_offset, job.region_offset + job.size_bytes
        source.read_into(self._memory[begin:end], job.offset)
        _scale(self.bytes[begin:end].view(self._dtype).view(job.shape), job.scaling)

    def _read_through_scratch(self, job: ReadJob, source: ByteSource) -> None:
        import torch

        scratch = self._scratch.get(job.size_bytes)
        source.read_into(scratch, job.offset)
        stored = torch.frombuffer(scratch, dtype=_torch_dtype(job.stack.dtype)).view(job.shape)
        values = stored.to(self._dtype)
        for placed in job.pieces:
            rows, cols = placed.piece.target
            part = self.tensor(placed.into)[job.device_slots, rows, cols]
            part.copy_(values[:, placed.piece.source])
            _scale(part, job.scaling)

    def _rearrange(self, job: RearrangeJob, source: ByteSource) -> None:
        import numpy as np
        import torch

        block, stored = job.block, job.block.op.source_dtype
        scratch = self._scratch.get(block.end - block.begin)
        source.read_into(scratch, block.begin)
        bits = f"u{ELEMENT_SIZE[stored]}"
        factors = np.frombuffer(scratch, bits).reshape(job.shape).transpose(job.order)
        for each in job.parts:
            part, values = self.tensor(each.into)[each.target], factors[each.source]
            if _torch_dtype(stored) == self._dtype:
                copy_in_tiles(values, part.view(torch.uint8).numpy().view(bits))
            else:  # in order first: torch casts a row at a time
                ordered = self._ordered.get(values.nbytes)
                copy_in_tiles(values, np.frombuffer(ordered, bits).reshape(values.shape))
                cast = torch.frombuffer(ordered, dtype=_torch_dtype(stored)).view(values.shape)
                part.copy_(cast)
            _scale(part, each.scaling)


def _errors_of(
    futures: Sequence[Future[int]], follow: Callable[[int], None]
) -> list[BaseException]:
    errors: list[BaseException] = []
    for num_done, future in enumerate(futures, 1):
        if error := future.exception():
            errors.append(error)
        elif not errors:
            follow(num_done)
    return errors


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, TORCH_DTYPES[name])


def _scale(values: Any, scaling: Scaling | None) -> None:
    """Multiply [slots, rows, cols] in place and in its own dtype, bit for bit like vLLM's
    `optimize` (0.33.0 lora_weights.py:37).
    """
    if scaling is None:
        return
    if not isinstance(scaling, tuple):
        values.mul_(scaling)
        return
    import torch

    values.mul_(torch.tensor(scaling, dtype=torch.float32).view(len(scaling), 1, 1))
