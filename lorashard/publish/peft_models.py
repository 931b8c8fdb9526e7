"""A PEFT model in memory, whole or sharded by FSDP2 -> a shard directory.

In: the model, on every rank. Out: what `split` would write of what `save_pretrained` would. Each rank
gives the writer the rows that it has; nothing is gathered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.options import LayoutOptions
from lorashard.errors import LayoutError
from lorashard.publish.writer import AdapterWriter, make_and_commit
from lorashard.shards.expert_map import ExpertMap
from lorashard.shards.manifest import Manifest
from lorashard.vllm_options import Strategy

_DEFAULT_OPTIONS = LayoutOptions()


@dataclass(frozen=True, slots=True)
class _OwnPart:
    """A rank's part of a tensor: the indices [begin, begin + len(values)) of `size` along an axis."""

    values: Any
    axis: int = 0
    begin: int = 0
    size: int | None = None
    is_copy: bool = False


def save_sharded(
    model: Any,
    out: str | os.PathLike[str],
    *,
    ep_size: int,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    options: LayoutOptions = _DEFAULT_OPTIONS,
    adapter_name: str = "default",
    barrier: Callable[[], object] | None = None,
    force: bool = False,
    sync: bool = True,
) -> Manifest:
    """Write the adapter of a PEFT model as a shard directory. Every rank calls it.

    model: a PeftModel. Its base model's config says how many experts there are, and how large.
    ep_size, strategy, expert_map, options, force, sync: as for `split`.
    barrier: of all ranks of torch.distributed; None = its own, or nothing in a single process.
    Raises AdapterError or ShardError, as AdapterWriter does.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - of the trainer's environment

    rank, world_size, own_barrier = process_group()

    def writer() -> AdapterWriter:
        made = AdapterWriter(
            out,
            _config_of(model, adapter_name),
            ep_size=ep_size,
            strategy=strategy,
            expert_map=expert_map,
            model=_base_config(model),
            options=options,
            rank=rank,
            world_size=world_size,
            force=force,
            sync=sync,
        )
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
            part = _own_part(name, tensor)
            if part is not None:
                made.tensor(
                    name,
                    part.values,
                    axis=part.axis,
                    begin=part.begin,
                    size=part.size,
                    is_copy=part.is_copy,
                )
        return made

    return make_and_commit(writer, out, rank, world_size, barrier or own_barrier)


def process_group() -> tuple[int, int, Callable[[], object]]:
    """Rank, number of ranks and barrier of torch.distributed."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1, lambda: None
    return dist.get_rank(), dist.get_world_size(), dist.barrier


def _config_of(model: Any, adapter_name: str) -> dict[str, Any]:
    """What `save_pretrained` writes into adapter_config.json (PEFT 0.21.2 peft_model.py:375)."""
    peft_config = model.peft_config[adapter_name]
    config: dict[str, Any] = peft_config.to_dict()
    base = model.base_model.model
    if config.get("base_model_name_or_path") is None:
        config["base_model_name_or_path"] = vars(base).get("name_or_path") or None
    if config.get("task_type") is None:
        cls = type(base)
        config["auto_mapping"] = {
            "base_model_class": cls.__name__, "parent_library": cls.__module__,
        }  # fmt: skip
    return config | {"inference_mode": True}


def _base_config(model: Any) -> Mapping[str, Any] | None:
    config: Any = getattr(model.base_model.model, "config", None)
    document: Mapping[str, Any] | None = config.to_dict() if hasattr(config, "to_dict") else None
    return document


def _own_part(name: str, tensor: Any) -> _OwnPart | None:
    """What this rank has of a tensor, and is to write; None if another rank has the same."""
    if not hasattr(tensor, "placements"):
        return _OwnPart(tensor, is_copy=True)
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, mesh = tensor.placements, tensor.device_mesh
    kinds = {type(placement) for placement in placements if not placement.is_replicate()}
    if kinds - {Shard}:
        raise LayoutError(
            f"{name} is a DTensor with placements {placements}.",
            hint="Redistribute it to Shard(0), or give the tensors to an AdapterWriter yourself.",
        )
    copies = [
        at for at, placed in zip(mesh.get_coordinate() or (), placements) if placed.is_replicate()
    ]
    if any(copies):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    cut = [axis for axis, (own, all_) in enumerate(zip(shape, tensor.shape)) if own != all_]
    if len(cut) > 1:
        raise LayoutError(
            f"{name} is sharded along {len(cut)} axes.",
            hint="Redistribute it so that one axis is sharded.",
        )
    axis = cut[0] if cut else 0
    return _OwnPart(tensor.to_local(), axis, offset[axis] if cut else 0, tensor.shape[axis])
