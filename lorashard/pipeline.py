"""`split`, stage by stage: read -> layout -> placement -> plan -> execute -> manifest.

The page to read first. Nothing is decided here; every stage is one call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from blake3 import blake3

from lorashard import __version__
from lorashard.adapter import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.errors import AdapterError, LorashardError, ManifestError, PlacementError
from lorashard.execute import Digests, Progress, execute_plan
from lorashard.experts import ExpertModule
from lorashard.layout import AdapterLayout, detect_layout
from lorashard.manifest import (
    MANIFEST_NAME,
    FileDigest,
    Manifest,
    ModuleInfo,
    ShardFile,
    SourceInfo,
    format_manifest,
    parse_manifest,
)
from lorashard.options import LayoutOptions, ModelFacts
from lorashard.output import check_target, staged_directory
from lorashard.pickled import convert_pickle, pickle_digest
from lorashard.placement import (
    Placement,
    bind_layers,
    explicit_placement,
    linear_placement,
    round_robin_placement,
)
from lorashard.plan import ShardPlan, build_plan
from lorashard.read import AdapterSource, find_adapter, read_adapter, read_json, read_model_facts
from lorashard.remote import Place, RemoteFolder, locate

Strategy = Literal["linear", "round_robin"]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_REPORT = "A fault of lorashard; please report it. Nothing was written."


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
        return DTYPES[self.dtype] if self.dtype else None


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
def prepared_split(adapter: Place, request: SplitRequest) -> Iterator[PreparedSplit]:
    """Read headers and decide everything. The source stays readable inside the block."""
    with opened_adapter(adapter, allow_pickle=request.allow_pickle) as source:
        facts, options, layout = read_layout(source, adapter, request)
        placement = place_experts(layout, request.ep_size, request.strategy, request.expert_map)
        if request.dtype not in (None, *DTYPES):
            raise AdapterError(f"dtype {request.dtype!r} is not one of {', '.join(DTYPES)}.")
        plan = build_plan(layout, placement, request.stored_dtype)
        options = replace(options, num_experts=layout.num_experts)
        notes = _notes(request, facts, layout)
        yield PreparedSplit(source, options, layout, placement, plan, notes)


def read_layout(
    source: AdapterSource, adapter: Place, request: SplitRequest
) -> tuple[ModelFacts | None, LayoutOptions, AdapterLayout]:
    """What the model says, the options that follow, and the layout that they lead to."""
    facts = read_model_facts(locate(request.model)) if request.model else None
    options = merge_facts(request.options, facts)
    return facts, options, detect_layout(source.index, options, str(adapter))


@contextmanager
def opened_adapter(adapter: Place, *, allow_pickle: bool) -> Iterator[AdapterSource]:
    """Read an adapter's headers; a local pickle is converted into a temporary file first."""
    if isinstance(adapter, RemoteFolder):
        yield read_adapter(adapter)
        return
    directory = find_adapter(adapter)
    if (
        allow_pickle
        and not (directory / WEIGHTS_NAME).exists()
        and (directory / PICKLE_NAME).exists()
    ):
        with convert_pickle(directory) as converted:
            yield read_adapter(converted)
    else:
        yield read_adapter(directory)


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


def read_manifest(directory: Place) -> Manifest:
    """The manifest of a shard directory. Raises ManifestError if it has none, or a damaged one."""
    return parse_manifest(manifest_bytes(directory), f"{directory}/{MANIFEST_NAME}")


def manifest_bytes(directory: Place) -> bytes:
    """The manifest as it stands there. Raises ManifestError if there is none."""
    if isinstance(directory, RemoteFolder):
        file = directory.file(MANIFEST_NAME)
        if file is None:
            raise ManifestError(
                f"{directory}/{MANIFEST_NAME}",
                "no such file",
                hint="Is the name right, and is it a shard directory, as `lorashard split` writes it?",
            )
        return file.read(0, file.size_bytes)
    path = directory / MANIFEST_NAME
    try:
        return path.read_bytes()
    except OSError as err:
        reason = "not a finished shard directory" if directory.is_dir() else "no such directory"
        raise ManifestError(path, reason) from err


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write lorashard.json and sync it, once it is known to be read as what it was made of."""
    content, path = format_manifest(manifest), directory / MANIFEST_NAME
    if parse_manifest(content, str(path)) != manifest:
        raise ManifestError(path, "would be read otherwise than it was written", hint=_REPORT)
    write_synced(path, content)


def has_manifest(place: Place) -> bool:
    """Whether a place is a shard directory rather than an adapter."""
    if isinstance(place, RemoteFolder):
        return place.has(MANIFEST_NAME)
    return (place / MANIFEST_NAME).exists()


def is_shard_directory(path: Path, names: frozenset[str]) -> bool:
    """Whether `path`, with `names` in it, is a finished shard directory and nothing else."""
    try:
        return names <= {MANIFEST_NAME, CONFIG_NAME, *read_manifest(path).files}
    except LorashardError:
        return False


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and sync it to disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def merge_facts(options: LayoutOptions, facts: ModelFacts | None) -> LayoutOptions:
    """Flags first, then what the model's config.json says."""
    if facts is None:
        return options
    if options.num_experts not in (None, facts.num_experts):
        raise AdapterError(
            f"--num-experts is {options.num_experts}, the model has {facts.num_experts} experts.",
            hint="Leave --num-experts out when --model is given.",
        )
    return replace(
        options,
        num_experts=facts.num_experts,
        hidden_size=options.hidden_size or facts.hidden_size,
        intermediate_size=options.intermediate_size or facts.intermediate_size,
        gate_up=options.gate_up or facts.gate_up,
    )


def place_experts(
    layout: AdapterLayout, ep_size: int, strategy: Strategy, expert_map: Path | None
) -> Placement:
    """The placement that is asked for; `expert_map` wins over `strategy`. Raises PlacementError."""
    num_experts = layout.num_experts
    if strategy not in ("linear", "round_robin"):
        raise PlacementError(f"Placement strategy {strategy!r} is not known.")
    if expert_map is not None:
        spec = read_json(expert_map)
        placement = explicit_placement(spec, num_experts, ep_size)
        return bind_layers(placement, [module.name for module in layout.modules])
    if strategy == "round_robin":
        return round_robin_placement(num_experts, ep_size)
    return linear_placement(num_experts, ep_size)


def _notes(
    request: SplitRequest, facts: ModelFacts | None, layout: AdapterLayout
) -> tuple[str, ...]:
    notes = []
    if not layout.gate_up_known:
        notes.append(
            "Neither the adapter nor --model names the base model; gate and up rows are taken as "
            "concatenated (only gpt-oss interleaves them). --model makes sure."
        )
    grouped = facts is not None and (facts.num_expert_group or 1) > 1
    asked = request.strategy == "round_robin" and request.expert_map is None
    if asked and facts is not None and not grouped:
        notes.append(
            f"vLLM places the experts of {facts.model_type} linearly even with round_robin asked "
            "for: the model has no expert groups."
        )
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


def describe_files(plan: ShardPlan, digests: Sequence[str]) -> dict[str, ShardFile]:
    """What the manifest says about the files of `plan`; digests: BLAKE3 in hex, in plan order."""
    return {
        file.name: ShardFile(FileDigest(file.size_bytes, digest), file.tensors)
        for file, digest in zip(plan.files, digests)
    }


def has_files_of(manifest: Manifest, plan: ShardPlan) -> bool:
    """Whether the files in the manifest are those of `plan`: names, sizes and tensor tables."""
    planned = {file.name: (file.size_bytes, file.tensors) for file in plan.files}
    recorded = {
        name: (file.digest.size_bytes, file.tensors) for name, file in manifest.files.items()
    }
    return planned == recorded


def describe_module(module: ExpertModule) -> ModuleInfo:
    """What the manifest says about one experts container."""
    return ModuleInfo(
        layout=module.layout,
        source_layout=module.source_layout,
        gate_up=module.gate_up,
        lora_rank=module.lora_rank,
        scaling=dict(module.scaling),
        absent_experts=module.absent_experts,
        expert_lora_ranks={p: dict(odd) for p, odd in module.expert_lora_ranks.items()},
    )
