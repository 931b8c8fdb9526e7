"""Layout, placement and plan -> what the manifest says about them. Pure.

In: what a split decided, and the digests of what it wrote. Out: a `Manifest`, or a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import ExpertModule
from lorashard.adapter.options import LayoutOptions
from lorashard.shards.manifest import FileDigest, Manifest, ModuleInfo, ShardFile, SourceInfo
from lorashard.shards.placement import Placement
from lorashard.shards.plan import ShardPlan
from lorashard.version import __version__


def make_manifest(
    source: SourceInfo,
    options: LayoutOptions,
    layout: AdapterLayout,
    placement: Placement,
    plan: ShardPlan,
    digests: Sequence[str],
    *,
    dtype: str | None,
) -> Manifest:
    """The manifest of the files of `plan`.

    digests: BLAKE3 in hex, in plan order. dtype: what the values were cast to, as safetensors names
    it, or None.
    """
    return Manifest(
        lorashard_version=__version__,
        source=source,
        options=options,
        dtype=dtype,
        gate_up_known=layout.gate_up_known,
        placement=placement,
        modules=describe_modules(layout),
        files=describe_files(plan, digests),
    )


def describe_files(plan: ShardPlan, digests: Sequence[str]) -> dict[str, ShardFile]:
    """What the manifest says about the files of `plan`; digests: BLAKE3 in hex, in plan order."""
    return {
        file.name: ShardFile(FileDigest(file.size_bytes, digest), file.tensors)
        for file, digest in zip(plan.files, digests)
    }


def describe_modules(layout: AdapterLayout) -> dict[str, ModuleInfo]:
    """What the manifest says about each experts container, by name."""
    return {module.name: describe_module(module) for module in layout.modules}


def describe_module(module: ExpertModule) -> ModuleInfo:
    """What the manifest says about one experts container."""
    return ModuleInfo(
        layout=module.layout,
        source_layout=str(module.source_layout),
        gate_up=module.gate_up,
        lora_rank=module.lora_rank,
        scaling=dict(module.scaling),
        absent_experts=module.absent_experts,
        expert_lora_ranks={p: dict(odd) for p, odd in module.expert_lora_ranks.items()},
    )


def differing_files(manifest: Manifest, plan: ShardPlan) -> tuple[str, ...]:
    """Names of the files whose size or tensor table is not the one that `plan` gives them."""
    planned = {file.name: (file.size_bytes, file.tensors) for file in plan.files}
    recorded = {
        name: (file.digest.size_bytes, file.tensors) for name, file in manifest.files.items()
    }
    names = dict.fromkeys((*recorded, *planned))
    return tuple(name for name in names if planned.get(name) != recorded.get(name))
