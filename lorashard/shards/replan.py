"""What made a shard directory, made again from its manifest, and compared with what is there.

The manifest keeps the source's header, so the same pure stages lead to the same layout and plan.
"""

from __future__ import annotations

from blake3 import blake3

from lorashard.adapter.config import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterIndex,
    parse_config,
)
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.errors import (
    AdapterError,
    HeaderError,
    LorashardError,
    ManifestError,
    ShardError,
    VerificationError,
)
from lorashard.header import LENGTH_BYTES, header_length, parse_header
from lorashard.shards.manifest import Manifest, describe_module, has_files_of
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import place_experts
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.storage.remote import Location
from lorashard.storage.small_files import read_small_file


def replan(
    manifest: Manifest, config_bytes: bytes, shards: Location
) -> tuple[AdapterLayout, ShardPlan]:
    """The layout and the plan that `split` carried out, made again from the manifest.

    Raises ManifestError if the files that it leads to are not the ones in the manifest.
    """
    path = f"{shards}/{MANIFEST_NAME}"
    header_bytes = manifest.source.header
    try:
        config = parse_config(config_bytes, f"{shards}/{CONFIG_NAME}")
        size = manifest.source.files[WEIGHTS_NAME].size_bytes
        length = header_length(header_bytes, size, path)
        text = header_bytes[LENGTH_BYTES:]
        if len(text) != length:
            raise HeaderError(path, "the header has another length than it says")
        header = parse_header(text, size, path)
        index = AdapterIndex(config, header.tensors, header.data_begin, header.file_size)
        layout = detect_layout(index, manifest.options, str(shards))
        plan = build_plan(layout, manifest.placement, manifest.dtype)
    except LorashardError as err:
        raise ManifestError(path, f"does not describe its source ({err.message})") from err
    if not has_files_of(manifest, plan):
        raise ManifestError(path, "its tensor tables do not follow from its source and placement")
    return layout, plan


def source_was_pickled(manifest: Manifest) -> bool:
    """Whether the source was adapter_model.bin; `merge` gives its tensors as safetensors."""
    return PICKLE_NAME in manifest.source.files


def read_own_config(manifest: Manifest, shards: Location) -> bytes:
    """The config that `split` copied. Raises ShardError if it is not that one."""
    try:
        content = read_small_file(shards, CONFIG_NAME)
    except AdapterError as err:
        raise ShardError(err.message, hint="Copy the directory again.") from err
    if blake3(content).hexdigest() != manifest.source.files[CONFIG_NAME].blake3:
        raise VerificationError(str(shards), (digest_finding(shards, CONFIG_NAME),))
    return content


def check_manifest(manifest: Manifest, layout: AdapterLayout, shards: Location) -> None:
    """Raise ManifestError if what is carried over, or relied on, was changed since `split`."""
    path, placement = f"{shards}/{MANIFEST_NAME}", manifest.placement
    if {module.name: describe_module(module) for module in layout.modules} != manifest.modules:
        raise ManifestError(path, "does not describe its modules as its source has them")
    if placement.strategy != "explicit" and placement != place_experts(
        layout, placement.ep_size, placement.strategy
    ):
        raise ManifestError(path, f"its ranks are not those of a {placement.strategy} placement")


def digest_finding(shards: Location, name: str) -> str:
    """The finding about a file that has another digest."""
    return f"{shards}/{name}: BLAKE3 differs from the manifest's"
