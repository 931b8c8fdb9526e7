"""Layouts, plans and manifests -> the numbers that `inspect` and `plan` show. Pure.

Every function returns plain dicts and lists: what `--json` prints and the tables are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import ExpertModule, FactorStack
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.header import TensorEntry
from lorashard.inspect.memory import expert_buffer_bytes, host_bytes_lorashard, host_bytes_stock
from lorashard.shards.manifest import Manifest, ModuleInfo
from lorashard.shards.placement import Placement
from lorashard.shards.plan import ShardPlan


def summarize_adapter(
    config: LoraConfig, tensors: Sequence[TensorEntry], layout: AdapterLayout
) -> dict[str, Any]:
    """What an adapter holds."""
    replicated_bytes = sum(entry.size_bytes for entry in layout.replicated)
    total_bytes = sum(entry.size_bytes for entry in tensors)
    return {
        "kind": "adapter",
        "num_experts": layout.num_experts,
        "counted_from_r": layout.counted_from_r,
        "num_modules": len(layout.modules),
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "dtypes": sorted({entry.dtype for entry in tensors}),
        "num_tensors": len(tensors),
        "total_bytes": total_bytes,
        "expert_bytes": total_bytes - replicated_bytes,
        "replicated": {
            "num_tensors": len(layout.replicated),
            "bytes": replicated_bytes,
            "by_kind": _count_kinds(entry.name for entry in layout.replicated),
        },
        "gate_up_known": layout.gate_up_known,
        "modules": {m.name: _describe_stacks(m) for m in layout.modules},
    }


def summarize_shards(manifest: Manifest) -> dict[str, Any]:
    """What a shard directory holds, from its manifest alone."""
    return {
        "kind": "shards",
        "lorashard_version": manifest.lorashard_version,
        "num_experts": manifest.placement.num_experts,
        "num_modules": len(manifest.modules),
        "dtype_cast": manifest.dtype,
        "source": {
            "repo": manifest.source.repo,
            "revision": manifest.source.revision,
            "files": {
                name: {"size": digest.size_bytes, "blake3": digest.blake3}
                for name, digest in manifest.source.files.items()
            },
        },
        "placement": {
            "strategy": manifest.placement.strategy,
            "ep_size": manifest.placement.ep_size,
            "ranks": [list(experts) for experts in manifest.placement.ranks],
            "modules_placed_differently": sorted(manifest.placement.layers),
        },
        "files": {
            name: {"bytes": file.digest.size_bytes, "num_tensors": len(file.tensors)}
            for name, file in manifest.files.items()
        },
        "modules": {name: _describe_info(info) for name, info in manifest.modules.items()},
    }


def summarize_plan(
    layout: AdapterLayout, placement: Placement, plan: ShardPlan, max_loras: int, max_lora_rank: int
) -> dict[str, Any]:
    """Per rank: experts, bytes to read, bytes on disk, vLLM's GPU buffers, host memory."""
    replicated_bytes = plan.files[0].size_bytes
    adapter_expert_bytes = _expert_bytes(layout, range(layout.num_experts), None)
    fused = all(module.layout == "fused" for module in layout.modules)
    ranks = []
    for ep_rank, file in enumerate(plan.files[1:]):
        experts = placement.ranks[ep_rank]
        rank_bytes = _expert_bytes(layout, experts, None)
        ranks.append({
            "ep_rank": ep_rank,
            "num_experts": len(experts),
            "experts": list(experts),
            "bytes_on_disk": file.size_bytes,
            "bytes_to_read": file.size_bytes + replicated_bytes,
            "gpu_buffer_bytes": sum(
                _buffer_bytes(module, len(placement.ranks_of(module.name)[ep_rank]), max_loras, max_lora_rank)
                for module in layout.modules
            ),
            "host_bytes": host_bytes_lorashard(rank_bytes, replicated_bytes),
            "host_bytes_without": host_bytes_stock(
                "fused" if fused else "per_expert",
                adapter_expert_bytes,
                rank_bytes,
                replicated_bytes,
                rank_lora_b_bytes=_expert_bytes(layout, experts, "lora_B"),
            ),
        })  # fmt: skip
    return {
        "num_experts": layout.num_experts,
        "counted_from_r": layout.counted_from_r,
        "num_modules": len(layout.modules),
        "ep_size": placement.ep_size,
        "placement": placement.strategy,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
        "replicated_bytes": replicated_bytes,
        "total_bytes": sum(file.size_bytes for file in plan.files),
        "files": [file.name for file in plan.files],
        "ranks": ranks,
    }


def _count_kinds(names: Iterable[str]) -> dict[str, int]:
    """Replicated tensors by what they belong to, e.g. {"self_attn": 16, "shared_experts": 6}."""
    counts: dict[str, int] = {}
    for name in names:
        parts = [p for p in name.partition(".lora_")[0].split(".") if not p.isdecimal()]
        kind = parts[-2] if len(parts) > 1 and parts[-1].endswith("_proj") else parts[-1]
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def _describe_stacks(module: ExpertModule) -> dict[str, Any]:
    stacks = module.stacks_by_factor
    return {
        "layout": module.layout,
        "source_layout": str(module.source_layout),
        "gate_up": module.gate_up,
        "scaling": {p: _plain(scale) for p, scale in module.scaling.items()},
        "lora_ranks": {s.projection: s.rows for s in module.stacks if s.matrix == "lora_A"},
        "features": {
            p: {"in": stacks[p, "lora_A"].cols, "out": stacks[p, "lora_B"].rows}
            for p in module.scaling
        },
        "shared_factors": [f"{s.projection}.{s.matrix}" for s in module.stacks if s.shared],
        "absent_experts": list(module.absent_experts),
        "expert_lora_ranks": {
            p: {str(e): r for e, r in odd.items()} for p, odd in module.expert_lora_ranks.items()
        },
    }  # fmt: skip


def _describe_info(info: ModuleInfo) -> dict[str, Any]:
    return {
        "layout": info.layout,
        "source_layout": info.source_layout,
        "gate_up": info.gate_up,
        "lora_rank": info.lora_rank,
        "scaling": {p: _plain(scale) for p, scale in info.scaling.items()},
        "absent_experts": list(info.absent_experts),
        "expert_lora_ranks": {
            p: {str(e): r for e, r in odd.items()} for p, odd in info.expert_lora_ranks.items()
        },
    }


def _plain(scale: float | Sequence[float]) -> float | list[float]:
    return list(scale) if isinstance(scale, Sequence) else scale


def _expert_bytes(layout: AdapterLayout, experts: Sequence[int], matrix: str | None) -> int:
    stacks = [
        stack for module in layout.modules for stack in module.stacks
        if matrix in (None, stack.matrix)
    ]  # fmt: skip
    return sum(_stack_bytes(stack) * (1 if stack.shared else len(experts)) for stack in stacks)


def _stack_bytes(stack: FactorStack) -> int:
    return stack.rows * stack.cols * ELEMENT_SIZE[stack.dtype]


def _buffer_bytes(module: ExpertModule, num_local: int, max_loras: int, max_lora_rank: int) -> int:
    """GPU bytes of one layer. vLLM keeps its buffers in the model's dtype, 2 bytes as served."""
    hidden_size, intermediate_size = _expert_sizes(module)
    return expert_buffer_bytes(
        num_local_experts=num_local,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        gated=module.gate_up != "none",
        element_size=2,
        # Of the models whose wrapper takes fused experts, gpt-oss is the one an adapter shows.
        wrapper="3d" if module.gate_up == "interleaved" else "2d",
    )


def _expert_sizes(module: ExpertModule) -> tuple[int, int]:
    """(H, I) of a module's experts, from whichever projection is trained."""
    projection = module.stacks[0].projection
    if "down_proj" in module.scaling:
        projection = "down_proj"
    stacks = module.stacks_by_factor
    in_features = stacks[projection, "lora_A"].cols
    out_features = stacks[projection, "lora_B"].rows
    if projection == "down_proj":
        return out_features, in_features
    return in_features, out_features // 2 if projection == "gate_up_proj" else out_features
