"""Carries out the reads that `reads` planned: bytes of shard files -> tensors for set_lora.

Where the bytes in the shard are those that the device wants they are read straight into place,
otherwise through a block of scratch memory. Many threads; each byte is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from math import prod
from typing import Any

from lorashard.dtypes import ELEMENT_SIZE, TORCH_DTYPES
from lorashard.storage.local import ByteSource
from lorashard.vllm_plugin.load.contents import RankSources, Scaling
from lorashard.vllm_plugin.load.reads import CopyJob, LayerPlan, PlacedFactor, ReadJob
from lorashard.writing.blocks import BLOCK_BYTES


class Filler:
    """Fills one region. `dtype`: of the device's LoRA buffers, a safetensors name."""

    def __init__(self, region: Any, sources: RankSources, dtype: str, threads: Executor) -> None:
        import torch

        self._memory = memoryview(region)
        self._bytes = torch.from_numpy(region)
        self._sources = sources
        self._dtype = getattr(torch, TORCH_DTYPES[dtype])
        self._element_size = ELEMENT_SIZE[dtype]
        self._threads = threads
        self._scratch = threading.local()

    def tensor(self, placed: PlacedFactor) -> Any:
        """The torch tensor [num_slots, rows, cols] of a factor: a view of the region."""
        size = prod(placed.shape) * self._element_size
        view = self._bytes[placed.offset : placed.offset + size]
        return view.view(self._dtype).view(placed.shape)

    def run(self, layers: Sequence[LayerPlan], jobs: Sequence[ReadJob | CopyJob]) -> int:
        """Do all jobs and zero what none of them fills; the number of bytes read.

        Raises the first error, once no thread writes to the region any more.
        """
        for layer in layers:
            for placed in layer.factors:
                if not placed.factor.is_covered:
                    self.tensor(placed).zero_()
        # Opened by this thread, before the others share them.
        sources = {rank: self._sources.source_of(rank) for rank in {j.ep_rank for j in jobs}}
        futures = [self._threads.submit(self._do, job, sources[job.ep_rank]) for job in jobs]
        errors = [err for err in (future.exception() for future in futures) if err]
        try:
            if errors:
                raise errors[0]
            return sum(future.result() for future in futures)
        finally:
            # An error and the frame that it passed through hold each other, and this frame holds
            # the region: without the cycle the region is free again as soon as the error is gone.
            del futures, errors

    def _do(self, job: ReadJob | CopyJob, source: ByteSource) -> int:
        if isinstance(job, CopyJob):
            source.read_into(self._memory[job.target : job.target + job.size], job.begin)
            return job.size
        if job.is_verbatim:
            self._read_verbatim(job, source)
        else:
            self._read_through_scratch(job, source)
        return job.size_bytes

    def _read_verbatim(self, job: ReadJob, source: ByteSource) -> None:
        begin, end = job.region_offset, job.region_offset + job.size_bytes
        source.read_into(self._memory[begin:end], job.offset)
        _scale(self._bytes[begin:end].view(self._dtype).view(job.shape), job.scaling)

    def _read_through_scratch(self, job: ReadJob, source: ByteSource) -> None:
        import torch

        scratch = self._scratch_of_thread(job.size_bytes)
        source.read_into(memoryview(scratch)[: job.size_bytes], job.offset)
        data = torch.frombuffer(scratch, dtype=torch.uint8, count=job.size_bytes)
        stored = data.view(getattr(torch, TORCH_DTYPES[job.stack.dtype])).view(job.shape)
        values = stored.to(self._dtype)
        for placed in job.pieces:
            rows, cols = placed.piece.target
            part = self.tensor(placed.into)[job.device_slots, rows, cols]
            part.copy_(values[:, placed.piece.source])
            _scale(part, job.scaling)

    def _scratch_of_thread(self, size: int) -> bytearray:
        scratch: bytearray | None = getattr(self._scratch, "buffer", None)
        if scratch is None or len(scratch) < size:
            self._scratch.buffer = scratch = bytearray(max(size, BLOCK_BYTES))
        return scratch


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
