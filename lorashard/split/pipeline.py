"""`split`, stage by stage: read -> layout -> placement -> plan -> execute -> manifest.

The page to read first. Nothing is decided here; every stage is one call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.base_model import ModelFacts, merge_facts
from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.pickled import pickle_digest
from lorashard.adapter.read import AdapterSource, opened_adapter, read_model_facts
from lorashard.dtypes import CAST_DTYPES
from lorashard.errors import AdapterError
from lorashard.progress import Progress
from lorashard.shards.directory import is_shard_directory, write_manifest
from lorashard.shards.manifest import (
    FileDigest,
    Manifest,
    SourceInfo,
    describe_files,
    describe_module,
)
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import (
    Placement,
    Strategy,
    place_experts,
    strategy_in_vllm,
)
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.storage.local import write_synced
from lorashard.storage.remote import Location, locate
from lorashard.storage.small_files import read_json
from lorashard.storage.staging import check_target, staged_directory
from lorashard.version import __version__
from lorashard.writing.execute import Digests, execute_plan


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """What the user asks for. `options` are the flags that decide between layouts.

    expert_map: a JSON file with an explicit placement; it wins over `strategy`.
    model: a base model's directory or config.json, or its id on the Hub, to check against.
    dtype: torch name to cast every float tensor to, or None.
    """

    ep_size: int
    strategy: Strategy = "linear"
    expert_map: Path | None = None
    model: str | os.PathLike[str] | None = None
    dtype: str | None = None
    options: LayoutOptions = field(default_factory=LayoutOptions)
    allow_pickle: bool = False

    @property
    def stored_dtype(self) -> str | None:
        """`dtype` as safetensors names it; None = nothing is cast."""
        return CAST_DTYPES[self.dtype] if self.dtype else None


@dataclass(frozen=True, slots=True)
class PreparedSplit:
    """Everything decided, nothing written. `notes` are worth telling the user."""

    source: AdapterSource
    options: LayoutOptions
    layout: AdapterLayout
    placement: Placement
    plan: ShardPlan
    notes: tuple[str, ...]


def split_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    request: SplitRequest,
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the shard directory `out`. It appears whole or not at all.

    adapter: a directory, or hf://owner/name[@revision] or another URL, which is streamed.
    progress: called with source bytes done since the last call.
    Raises AdapterError, PlacementError or ShardError.
    """
    target = Path(out)
    check_target(target, force=force, replaceable=is_shard_directory)
    with prepared_split(locate(adapter), request) as prepared:
        return write_shards(prepared, target, request, force=force, progress=progress)


@contextmanager
def prepared_split(adapter: Location, request: SplitRequest) -> Iterator[PreparedSplit]:
    """Read headers and decide everything. The source stays readable inside the block."""
    with opened_adapter(adapter, allow_pickle=request.allow_pickle) as source:
        facts, options, layout = read_layout(source, adapter, request)
        expert_map = None if request.expert_map is None else read_json(request.expert_map)
        placement = place_experts(layout, request.ep_size, request.strategy, expert_map)
        if request.dtype not in (None, *CAST_DTYPES):
            raise AdapterError(f"dtype {request.dtype!r} is not one of {', '.join(CAST_DTYPES)}.")
        plan = build_plan(layout, placement, request.stored_dtype)
        options = replace(options, num_experts=layout.num_experts)
        notes = _notes(request, facts, layout)
        yield PreparedSplit(source, options, layout, placement, plan, notes)


def read_layout(
    source: AdapterSource, adapter: Location, request: SplitRequest
) -> tuple[ModelFacts | None, LayoutOptions, AdapterLayout]:
    """What the model says, the options that follow, and the layout that they lead to."""
    facts = read_model_facts(locate(request.model)) if request.model else None
    options = merge_facts(request.options, facts)
    return facts, options, detect_layout(source.index, options, str(adapter))


def write_shards(
    prepared: PreparedSplit, out: Path, request: SplitRequest, *, force: bool, progress: Progress
) -> Manifest:
    """Carry out a prepared split."""
    source = prepared.source
    with staged_directory(
        out, last=MANIFEST_NAME, force=force, replaceable=is_shard_directory
    ) as staging:
        with source.opened() as weights:
            digests = execute_plan(prepared.plan, weights, source.header, staging, progress)
        manifest = _manifest(prepared, request, digests)
        write_synced(staging / CONFIG_NAME, source.config_bytes)
        write_manifest(staging, manifest)
    return manifest


def _notes(
    request: SplitRequest, facts: ModelFacts | None, layout: AdapterLayout
) -> tuple[str, ...]:
    notes = []
    if not layout.gate_up_known:
        notes.append(
            "Neither the adapter nor --model names the base model; gate and up rows are taken as "
            "concatenated (only gpt-oss interleaves them). --model makes sure."
        )
    if facts is not None and request.expert_map is None:
        _, note = strategy_in_vllm(request.strategy, facts)
        notes += [note] if note else []
    if layout.num_experts < request.ep_size:
        notes.append(
            f"{request.ep_size - layout.num_experts} of {request.ep_size} ranks hold no expert."
        )
    return tuple(notes)


def _manifest(prepared: PreparedSplit, request: SplitRequest, digests: Digests) -> Manifest:
    source = prepared.source
    weights = FileDigest(source.index.file_size, digests.source)
    config = FileDigest(len(source.config_bytes), blake3(source.config_bytes).hexdigest())
    pickled = pickle_digest(source.place) if isinstance(source.place, Path) else None
    files = {CONFIG_NAME: config, WEIGHTS_NAME: weights} | (
        {PICKLE_NAME: FileDigest(*pickled)} if pickled else {}
    )
    return Manifest(
        lorashard_version=__version__,
        source=SourceInfo(source.repo, source.revision, files=files, header=source.header),
        options=prepared.options,
        dtype=request.stored_dtype,
        gate_up_known=prepared.layout.gate_up_known,
        placement=prepared.placement,
        modules={module.name: describe_module(module) for module in prepared.layout.modules},
        files=describe_files(prepared.plan, digests.files),
    )
