"""What made a shard directory, made again from its manifest and compared with what is there.

In: a manifest, which keeps the source's header, and the config beside it. Out: the layout and the
plan that `split` carried out, since the same pure stages lead to the same result; and every
contradiction between them and the manifest. `check_shards` is what verbs that read shards call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterIndex,
    parse_config,
)
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import GateUp
from lorashard.errors import (
    AdapterError,
    HeaderError,
    LorashardError,
    ManifestError,
    ShardError,
    VerificationError,
)
from lorashard.header import LENGTH_BYTES, header_length, parse_header
from lorashard.rules import DAMAGED_BYTES
from lorashard.shards.describe import describe_modules, differing_files
from lorashard.shards.directory import LocatedShards, find_files
from lorashard.shards.held import find_partial
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME, rank_file_name
from lorashard.shards.placement import linear_placement, round_robin_placement
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.shards.seal import CHANGED
from lorashard.storage.remote import Location, RemoteFile
from lorashard.storage.small_files import read_small_file

_ORDERS: tuple[GateUp, ...] = ("concatenated", "interleaved")


@dataclass(frozen=True, slots=True)
class RebuiltPlan:
    """What `split` decided, made again from a manifest."""

    layout: AdapterLayout
    plan: ShardPlan


@dataclass(frozen=True, slots=True)
class CheckedShards:
    """A shard directory whose manifest follows from its own source header, config and placement.

    files: in plan order; each has the size, and if local the header, that the manifest records.
    Their data is not read yet.
    """

    place: Location
    manifest: Manifest
    config_bytes: bytes
    layout: AdapterLayout
    plan: ShardPlan
    files: tuple[Path | RemoteFile, ...]


def check_shards(shards: LocatedShards) -> CheckedShards:
    """Check everything about a shard directory that can be checked without reading tensor data.

    Raises ManifestError if the manifest contradicts itself or its source, VerificationError if the
    config was changed, ShardError if a file is missing (PartialShardsError after a `pull` of some
    ranks) or is not as the manifest records it.
    """
    place, manifest = shards.place, shards.manifest
    config_bytes = _read_config(shards)
    rebuilt = rebuild_plan(manifest, config_bytes, place)
    contradiction = next(find_contradictions(manifest, rebuilt), None)
    if contradiction is not None:
        raise ManifestError(f"{place}/{MANIFEST_NAME}", contradiction, rule=DAMAGED_BYTES)
    if shards.was_changed:
        raise ManifestError(f"{place}/{MANIFEST_NAME}", CHANGED, rule=DAMAGED_BYTES)
    if isinstance(place, Path) and (partial := find_partial(manifest, place)) is not None:
        raise partial
    files = find_files(shards)
    return CheckedShards(place, manifest, config_bytes, rebuilt.layout, rebuilt.plan, files)


def rebuild_plan(manifest: Manifest, config_bytes: bytes, place: Location) -> RebuiltPlan:
    """The layout and the plan that lead to the manifest's files. `place` is for messages.

    Raises ManifestError if the source header, the config and the options do not fit together.
    """
    path = f"{place}/{MANIFEST_NAME}"
    header_bytes = manifest.source.header
    recorded_size = manifest.source.files[CONFIG_NAME].size_bytes
    if len(config_bytes) != recorded_size:
        raise ManifestError(
            path,
            f"source.files gives {CONFIG_NAME} {recorded_size} bytes, it has {len(config_bytes)}",
            rule=DAMAGED_BYTES,
        )
    try:
        config = parse_config(config_bytes, f"{place}/{CONFIG_NAME}")
        size = manifest.source.files[WEIGHTS_NAME].size_bytes
        length = header_length(header_bytes, size, path)
        text = header_bytes[LENGTH_BYTES:]
        if len(text) != length:
            raise HeaderError(path, "the length of the source header is not the one it states")
        header = parse_header(text, size, path)
        index = AdapterIndex(config, header.tensors, header.data_begin, header.file_size)
        layout = detect_layout(index, manifest.options, str(place))
        layout = _with_recorded_order(layout, manifest)
        return RebuiltPlan(layout, build_plan(layout, manifest.placement, manifest.dtype))
    except LorashardError as err:
        raise ManifestError(
            path, f"does not describe its source ({err.message})", rule=err.rule or DAMAGED_BYTES
        ) from err


def _with_recorded_order(layout: AdapterLayout, manifest: Manifest) -> AdapterLayout:
    """Where neither class nor Hub id tells the order of gate and up rows, take it as recorded.

    An earlier release may have known it from less. In the manifest it is one order for all modules,
    and the default where it is not known; anything else is left to `find_contradictions`.
    """
    recorded = {info.gate_up for info in manifest.modules.values()} & set(_ORDERS)
    if layout.gate_up_known or len(recorded) != 1:
        return layout
    order = next(order for order in _ORDERS if order in recorded)
    if order != "concatenated" and not manifest.gate_up_known:
        return layout
    modules = tuple(
        replace(module, gate_up=order) if module.gate_up in _ORDERS else module
        for module in layout.modules
    )
    return replace(layout, modules=modules, gate_up_known=manifest.gate_up_known)


def find_contradictions(manifest: Manifest, rebuilt: RebuiltPlan | None) -> Iterator[str]:
    """Where the manifest contradicts itself or its source, one sentence each, without full stop.

    rebuilt: from `rebuild_plan`; None if there is none, so that only the manifest itself counts.
    """
    yield from _placement_contradictions(manifest)
    if rebuilt is not None:
        described = describe_modules(rebuilt.layout)
        for name in sorted(set(described) | set(manifest.modules)):
            if described.get(name) != manifest.modules.get(name):
                yield f"module {name} is not described as its source has it"
        if manifest.gate_up_known != rebuilt.layout.gate_up_known:
            yield (
                f"options.gate_up_known is {str(manifest.gate_up_known).lower()}, which does not "
                "follow from the source, its config and the options; split again"
            )
    differing = () if rebuilt is None else differing_files(manifest, rebuilt.plan)
    for name in dict.fromkeys((*manifest.files, *differing)):
        slots = tuple(_slot_contradictions(manifest, name))
        yield from slots
        if name in differing and not slots:
            yield f"{name}: its tensors do not follow from the source and the placement"


def is_own_config(manifest: Manifest, config_bytes: bytes) -> bool:
    """Whether this is the adapter_config.json that the shards were made with."""
    return blake3(config_bytes).hexdigest() == manifest.source.files[CONFIG_NAME].blake3


def source_was_pickled(manifest: Manifest) -> bool:
    """Whether the source was adapter_model.bin; `merge` gives its tensors as safetensors."""
    return PICKLE_NAME in manifest.source.files


def describe_wrong_digest(place: Location, name: str) -> str:
    """The sentence about a file whose bytes are not the ones that were written."""
    return f"{place}/{name}: BLAKE3 differs from the manifest's"


def _read_config(shards: LocatedShards) -> bytes:
    try:
        content = read_small_file(shards.place, CONFIG_NAME)
    except AdapterError as err:
        raise ShardError(err.message, hint="Copy the directory again.") from err
    if not is_own_config(shards.manifest, content):
        raise VerificationError(
            str(shards.place), (describe_wrong_digest(shards.place, CONFIG_NAME),)
        )
    return content


def _placement_contradictions(manifest: Manifest) -> Iterator[str]:
    placement = manifest.placement
    if manifest.options.num_experts != placement.num_experts:
        told = manifest.options.num_experts
        yield f"options has num_experts {told}, the placement {placement.num_experts}"
    for name in sorted(set(placement.layers) - set(manifest.modules)):
        yield f"layers places {name!r}, which is no module of the manifest"
    rules = {"linear": linear_placement, "round_robin": round_robin_placement}
    rule = rules.get(placement.strategy)
    if rule is None:
        return
    expected = f"the {placement.strategy} placement of {placement.num_experts} experts on "
    if rule(placement.num_experts, placement.ep_size).ranks != placement.ranks:
        yield f"the ranks listed are not {expected}{placement.ep_size} ranks"
    if placement.layers:
        yield f"layers are placed differently, which is not {expected}{placement.ep_size} ranks"


def _slot_contradictions(manifest: Manifest, name: str) -> Iterator[str]:
    """Where a rank file does not have each module's stacks, one slot for each of its experts.

    The slots of a stack have one dtype and size, whichever file they are in.
    """
    if name == REPLICATED_NAME or name not in manifest.files:
        return
    ep_rank = list(manifest.files).index(name) - 1  # the replicated file comes first
    shapes = {entry.name: entry.shape for entry in manifest.files[name].tensors}
    replicated = {entry.name for entry in manifest.files[REPLICATED_NAME].tensors}
    slots, first_slots = _slot_kinds(manifest, ep_rank), _slot_kinds(manifest, 0)
    expected = set()
    for module, info in manifest.modules.items():
        num_local_experts = len(manifest.placement.ranks_of(module)[ep_rank])
        for projection in info.scaling:
            for matrix in ("lora_A", "lora_B"):
                tensor = f"{module}.{projection}.{matrix}"
                if tensor in replicated:
                    continue
                expected.add(tensor)
                shape = shapes.get(tensor)
                if shape is None:
                    yield f"{name}: {tensor} is missing"
                elif len(shape) != 3 or shape[0] != num_local_experts:
                    yield (
                        f"{name}: {tensor} is {list(shape)}, the placement puts "
                        f"{num_local_experts} experts on rank {ep_rank}"
                    )
                elif slots[tensor] != first_slots.get(tensor, slots[tensor]):
                    yield f"{name}: {tensor} has other slots than on rank 0"
    for tensor in sorted(set(shapes) - expected):
        yield f"{name}: {tensor} belongs to no module of the manifest"


def _slot_kinds(manifest: Manifest, ep_rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor of a rank file -> the dtype and shape of one slot."""
    name = rank_file_name(ep_rank, manifest.placement.ep_size)
    return {entry.name: (entry.dtype, entry.shape[1:]) for entry in manifest.files[name].tensors}
