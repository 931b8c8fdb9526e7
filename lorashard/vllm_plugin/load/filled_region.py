"""The outcome of matching an adapter with the engine's layers -> this rank's tensors, filled.

Plans where each tensor lies in a region of host memory, has it read (`fill`), and wraps the experts as
set_lora takes them. On the way the region can be copied to the device (`device_copy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.device_copy import begin_copy
from lorashard.vllm_plugin.load.fill import Filler
from lorashard.vllm_plugin.load.lora_model import packed_experts
from lorashard.vllm_plugin.load.outcome import LoadOutcome
from lorashard.vllm_plugin.load.reads import (
    CopyJob,
    LayerPlan,
    ReadJob,
    place_factors,
    plan_copies,
    plan_reads,
)
from lorashard.vllm_plugin.load.rearrangements import plan_rearrangements
from lorashard.vllm_plugin.load.regions import RegionPool
from lorashard.vllm_plugin.load.rests import rest_if_due
from lorashard.vllm_plugin.load.rows import find_copies
from lorashard.vllm_plugin.load.stages import Stages


@dataclass(frozen=True, slots=True)
class FilledRegion:
    """What was read of an adapter. layers: in the order of the outcome's.

    experts: vLLM's PackedLoRALayerWeights by live layer, views of the region. on_device: the same
    on the device; empty if they were not copied.
    """

    region: Any
    layers: Sequence[LayerPlan]
    experts: Mapping[str, Any]
    on_device: Mapping[str, Any]
    num_bytes: int


def fill_region(
    contents: AdapterContents,
    outcome: LoadOutcome,
    regions: RegionPool,
    threads: Executor,
    dtype: str,
    stages: Stages,
    copy_to: Any | None = None,
) -> FilledRegion:
    """Read the dense tensors and this rank's experts.

    dtype: of the device's LoRA buffers, a safetensors name. stages: where time is noted. copy_to: the
    device, if what is read should be copied there, too; without room for that it is not.
    """
    begin, end = contents.dense_range
    placed, size = place_factors(
        [layer.assembly for layer in outcome.layers], ELEMENT_SIZE[dtype], end - begin
    )
    layers = [
        LayerPlan(
            matched.live.name, factors, matched.runs, matched.live.local_experts,
            matched.contents.scaling,
        )
        for matched, factors in zip(outcome.layers, placed)
    ]  # fmt: skip
    stages.end("plan")
    region = regions.take(max(1, size))
    filler = Filler(region, contents.sources, dtype, threads)
    jobs: list[ReadJob | CopyJob] = list(plan_copies(begin, end))
    complete_up_to = {}  # the byte, by the number of jobs that are done
    for layer, layer_end in zip(layers, _layer_ends(layers, size)):
        jobs.extend(plan_reads([layer], contents.sources.offset_of, dtype, contents.rearranged))
        complete_up_to[len(jobs)] = layer_end
        rest_if_due()
    with ExitStack() as stack:
        copy = None if copy_to is None else begin_copy(filler.bytes, copy_to)
        if copy is not None:
            stack.callback(copy.wait)
        stages.end("get memory")

        copies = [(layer, find_copies(layer.experts)) for layer in layers]
        is_complete_once_read = not (contents.rearrangements or any(c for _, c in copies))

        def follow(num_done: int) -> None:
            if copy is not None and is_complete_once_read:
                copy.copy_up_to(complete_up_to.get(num_done, 0))
                rest_if_due()

        num_bytes = filler.run(layers, jobs, follow)
        # After the reads, which fill with zeros what a rearrangement may fill in part.
        num_bytes += filler.run((), list(plan_rearrangements(layers, contents.rearrangements)))
        for layer, of_layer in copies:
            filler.copy_slots(layer, of_layer)
        stages.end("read")
        if copy is not None:
            copy.copy_up_to(size)

    if copy is not None:
        stages.end("copy to the device")

    def packed(memory: Any) -> dict[str, Any]:
        return {
            layer.name: packed_experts(
                layer.name,
                matched.assembly,
                [filler.tensor(factor, memory) for factor in layer.factors],
            )
            for matched, layer in zip(outcome.layers, layers)
        }

    return FilledRegion(
        region, layers, packed(filler.bytes), {} if copy is None else packed(copy.bytes), num_bytes
    )


def _layer_ends(layers: Sequence[LayerPlan], size: int) -> Iterator[int]:
    """Where each layer's tensors end in the region: where the next ones begin."""
    yield from (layer.factors[0].offset for layer in layers[1:])
    yield size
