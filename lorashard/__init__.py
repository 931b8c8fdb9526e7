"""lorashard: pre-sliced LoRA adapters for Mixture-of-Experts models with expert parallelism.

    >>> shards = lorashard.open_shards("adapter-ep2")
    >>> shards.placement.ranks
    >>> shards.rank(0).tensor("model.layers.3.mlp.experts.gate_proj.lora_A")

Importing this package imports none of torch, rich and typer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorashard.convert import convert_shards
    from lorashard.errors import LorashardError
    from lorashard.merge import merge_shards
    from lorashard.options import LayoutOptions
    from lorashard.pipeline import SplitRequest, split_adapter
    from lorashard.placement import Placement
    from lorashard.pull import pull_shards
    from lorashard.push import push_shards
    from lorashard.reshard import reshard_shards
    from lorashard.shard import ShardDirectory, TensorFile, open_shards
    from lorashard.verify import verify_shards

_HOMES = {
    "LayoutOptions": "options",
    "LorashardError": "errors",
    "Placement": "placement",
    "ShardDirectory": "shard",
    "SplitRequest": "pipeline",
    "TensorFile": "shard",
    "convert_shards": "convert",
    "merge_shards": "merge",
    "open_shards": "shard",
    "pull_shards": "pull",
    "push_shards": "push",
    "reshard_shards": "reshard",
    "split_adapter": "pipeline",
    "verify_shards": "verify",
}

__all__ = [
    "LayoutOptions",
    "LorashardError",
    "Placement",
    "ShardDirectory",
    "SplitRequest",
    "TensorFile",
    "__version__",
    "convert_shards",
    "merge_shards",
    "open_shards",
    "pull_shards",
    "push_shards",
    "reshard_shards",
    "split_adapter",
    "verify_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
