"""A plain adapter's contents read as the loader reads them, each stack into a tensor of its own."""

from __future__ import annotations

from concurrent.futures import Executor
from itertools import chain

import numpy as np
import torch

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.vllm_plugin.load.assembly import Assembly, DeviceFactor, Piece
from lorashard.vllm_plugin.load.contents import AdapterContents, ModuleContents
from lorashard.vllm_plugin.load.fill import Filler
from lorashard.vllm_plugin.load.reads import LayerPlan, place_factors, plan_reads
from lorashard.vllm_plugin.load.rearrangements import plan_rearrangements
from lorashard.vllm_plugin.load.rows import find_runs


def read_stacks(contents: AdapterContents, threads: Executor) -> dict[str, bytes]:
    """Every stack of every module as a rank file has it, on a region that was full of other bytes.

    All of one dtype.
    """
    dtypes = {stack.dtype for module in contents.modules for stack in module.stacks}
    (dtype,) = dtypes
    assemblies = [Assembly(_factors(module), (), (), 0) for module in contents.modules]
    placed, size = place_factors(assemblies, ELEMENT_SIZE[dtype], 0)
    layers = [
        LayerPlan(
            module.name, factors, find_runs(module.ranks, module.ranks[0], 0), module.ranks[0],
            dict.fromkeys(module.scaling, 1.0),
        )
        for module, factors in zip(contents.modules, placed, strict=True)
    ]  # fmt: skip
    filler = Filler(np.full(max(1, size), 0xC3, np.uint8), contents.sources, dtype, threads)
    filler.run(
        layers, list(plan_reads(layers, contents.sources.offset_of, dtype, contents.rearranged))
    )
    filler.run((), list(plan_rearrangements(layers, contents.rearrangements)))
    stacks = chain.from_iterable(module.stacks for module in contents.modules)
    return {
        stack.name: filler.tensor(factor).contiguous().view(torch.uint8).numpy().tobytes()
        for stack, factor in zip(stacks, chain.from_iterable(placed), strict=True)
    }


def _factors(module: ModuleContents) -> tuple[DeviceFactor, ...]:
    return tuple(
        DeviceFactor(
            1 if stack.shared else len(module.ranks[0]), stack.rows, stack.cols,
            (Piece(stack, range(stack.rows), range(stack.rows)),),
        )
        for stack in module.stacks
    )  # fmt: skip
