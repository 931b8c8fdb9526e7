"""`split`, stage by stage: read -> layout -> placement -> plan -> execute -> manifest.

The page to read first. Nothing is decided here; every stage is one call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.options import LayoutOptions, LoraBLayout, Orientation
from lorashard.adapter.pickled import PickledTensors
from lorashard.adapter.read import AdapterSource, DetectedLayout, opened_adapter, read_layout
from lorashard.dtypes import CAST_DTYPES
from lorashard.errors import AdapterError
from lorashard.progress import Progress
from lorashard.shards.describe import make_manifest
from lorashard.shards.directory import holds_only_shards, write_manifest, write_notice
from lorashard.shards.expert_map import ExpertMap, read_expert_map
from lorashard.shards.manifest import FileDigest, Manifest, SourceInfo
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import Placement, place_experts, strategy_in_vllm
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.split.cast_notes import describe_losses
from lorashard.storage.local import write_new
from lorashard.storage.remote import Location
from lorashard.storage.staging import staged_directory
from lorashard.vllm_options import Strategy
from lorashard.writing.execute import execute_plan
from lorashard.writing.rearrange import CastLoss


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """How to split. `options` are the facts that decide between readings of the same tensors.

    expert_map: an explicit placement, which takes precedence over `strategy`: a JSON file, its
    content, or a Placement.
    model: a base model's directory or config.json, or its id on the Hub, to check against.
    dtype: torch name to cast every float tensor to, or None.
    sync: wait until the disk has the shards; without it, a crash of the machine may damage them.
    """

    ep_size: int
    strategy: Strategy = "linear"
    expert_map: ExpertMap | None = None
    model: str | os.PathLike[str] | None = None
    dtype: str | None = None
    options: LayoutOptions = field(default_factory=LayoutOptions)
    allow_pickle: bool = False
    sync: bool = True

    @property
    def stored_dtype(self) -> str | None:
        """`dtype` as safetensors names it; None = nothing is cast."""
        return CAST_DTYPES[self.dtype] if self.dtype else None


def request_of(
    ep_size: int | SplitRequest,
    *,
    strategy: Strategy,
    expert_map: ExpertMap | None,
    model: str | os.PathLike[str] | None,
    num_experts: int | None,
    lora_b_layout: LoraBLayout | None,
    orientation: Orientation | None,
    dtype: str | None,
    allow_pickle: bool,
    sync: bool = True,
) -> SplitRequest:
    """The request that the arguments of a call make.

    Raises TypeError for a SplitRequest with arguments beside it, which would be ignored.
    """
    size = ep_size.ep_size if isinstance(ep_size, SplitRequest) else ep_size
    request = SplitRequest(
        size,
        strategy=strategy,
        expert_map=expert_map,
        model=model,
        dtype=dtype,
        options=LayoutOptions(
            num_experts=num_experts, lora_b_layout=lora_b_layout, orientation=orientation
        ),
        allow_pickle=allow_pickle,
        sync=sync,
    )
    if not isinstance(ep_size, SplitRequest):
        return request
    if request != SplitRequest(size):
        raise TypeError("A SplitRequest has all options; give them to it, and not to the call.")
    return ep_size


@dataclass(frozen=True, slots=True)
class PreparedSplit:
    """Everything is decided, nothing is written. `notes` are for the user to read.

    options: those of the layout detection, with the number of experts filled in.
    """

    source: AdapterSource
    options: LayoutOptions
    layout: AdapterLayout
    placement: Placement
    plan: ShardPlan
    notes: tuple[str, ...]


@contextmanager
def prepared_split(adapter: Location, request: SplitRequest) -> Iterator[PreparedSplit]:
    """Read headers and decide everything. The source stays readable inside the block.

    Raises AdapterError or PlacementError.
    """
    with opened_adapter(adapter, allow_pickle=request.allow_pickle) as source:
        detected = read_layout(source, adapter, request.options, request.model)
        layout = detected.layout
        expert_map = read_expert_map(request.expert_map)
        placement = place_experts(layout, request.ep_size, request.strategy, expert_map)
        if request.dtype not in (None, *CAST_DTYPES):
            raise AdapterError(f"dtype {request.dtype!r} is not one of {', '.join(CAST_DTYPES)}.")
        plan = build_plan(layout, placement, request.stored_dtype)
        options = replace(detected.options, num_experts=layout.num_experts)
        yield PreparedSplit(source, options, layout, placement, plan, _notes(request, detected))


def write_shards(
    prepared: PreparedSplit,
    out: Path,
    request: SplitRequest,
    *,
    force: bool,
    progress: Progress,
    note: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Carry out a prepared split: the directory `out` appears whole or not at all.

    progress: called with source bytes done since the last call. note: called at the end, with what
    a cast has lost. Raises AdapterError or ShardError.
    """
    losses: list[CastLoss] = []
    source = prepared.source
    with staged_directory(
        out, last=MANIFEST_NAME, force=force, replaceable=holds_only_shards, sync=request.sync
    ) as staging:
        with source.opened() as weights:
            digests = execute_plan(
                prepared.plan,
                weights,
                source.header,
                staging,
                progress,
                losses.append,
                sync=request.sync,
            )
            source_info = _source_info(source, digests.source)
        manifest = make_manifest(
            source_info,
            prepared.options,
            prepared.layout,
            prepared.placement,
            prepared.plan,
            digests.files,
            dtype=request.stored_dtype,
        )
        write_new(staging / CONFIG_NAME, source.config_bytes, sync=request.sync)
        write_notice(staging, sync=request.sync)
        write_manifest(staging, manifest, sync=request.sync)
    for text in describe_losses(losses, prepared.plan, source.index.tensors):
        note(text)
    return manifest


def _source_info(source: AdapterSource, weights_digest: str) -> SourceInfo:
    files = {
        CONFIG_NAME: FileDigest(len(source.config_bytes), blake3(source.config_bytes).hexdigest()),
        WEIGHTS_NAME: FileDigest(source.index.file_size, weights_digest),
    }
    if isinstance(source.weights, PickledTensors):
        files[PICKLE_NAME] = FileDigest(*source.weights.digest())
    return SourceInfo(source.repo, source.revision, files, source.header)


def _notes(request: SplitRequest, detected: DetectedLayout) -> tuple[str, ...]:
    layout, notes = detected.layout, []
    if not layout.gate_up_known:
        notes.append(
            "Neither the adapter nor `model` says what the base model is (a local path does not tell); "
            "gate and up rows are assumed to be concatenated (only gpt-oss interleaves them). "
            "`model` makes sure."
        )
    if detected.facts is not None and request.expert_map is None:
        _, note = strategy_in_vllm(request.strategy, detected.facts)
        notes += [note] if note else []
    if layout.num_experts < request.ep_size:
        empty = request.ep_size - layout.num_experts
        hold = "holds" if empty == 1 else "hold"
        notes.append(f"{empty} of {request.ep_size} ranks {hold} no expert.")
    return tuple(notes)
