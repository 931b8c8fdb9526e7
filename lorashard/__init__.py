"""lorashard: pre-sliced LoRA adapters for Mixture-of-Experts models with expert parallelism.

    >>> shards = lorashard.open_shards("adapter-ep2")
    >>> shards.placement.ranks
    >>> shards.rank(0).tensor("model.layers.3.mlp.experts.gate_proj.lora_A")

Importing this package imports none of torch, rich and typer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorashard.version import __version__

if TYPE_CHECKING:
    from lorashard.adapter.options import LayoutOptions
    from lorashard.convert.convert import convert_shards
    from lorashard.errors import LorashardError
    from lorashard.merge import merge_shards
    from lorashard.publish.megatron import save_megatron
    from lorashard.publish.peft_models import save_sharded
    from lorashard.publish.publisher import Publisher
    from lorashard.publish.trainer import PublishCallback
    from lorashard.publish.writer import AdapterWriter
    from lorashard.reports.doctor import run_doctor
    from lorashard.reports.inspect import inspect_path
    from lorashard.reports.plan import plan_split
    from lorashard.reshard.reshard import reshard_shards
    from lorashard.shards.placement import Placement
    from lorashard.shards.tensors import ShardDirectory, TensorFile, open_shards
    from lorashard.split.batch import split_adapters
    from lorashard.split.parts import Part
    from lorashard.split.pipeline import SplitRequest
    from lorashard.split.run import split_adapter
    from lorashard.transfer.pull import pull_shards
    from lorashard.transfer.push import push_shards
    from lorashard.verify.verify import verify_shards

_HOMES = {
    "AdapterWriter": "publish.writer",
    "LayoutOptions": "adapter.options",
    "LorashardError": "errors",
    "Part": "split.parts",
    "Placement": "shards.placement",
    "Publisher": "publish.publisher",
    "PublishCallback": "publish.trainer",
    "ShardDirectory": "shards.tensors",
    "SplitRequest": "split.pipeline",
    "TensorFile": "shards.tensors",
    "convert_shards": "convert.convert",
    "inspect_path": "reports.inspect",
    "merge_shards": "merge",
    "open_shards": "shards.tensors",
    "plan_split": "reports.plan",
    "pull_shards": "transfer.pull",
    "push_shards": "transfer.push",
    "reshard_shards": "reshard.reshard",
    "run_doctor": "reports.doctor",
    "save_megatron": "publish.megatron",
    "save_sharded": "publish.peft_models",
    "split_adapter": "split.run",
    "split_adapters": "split.batch",
    "verify_shards": "verify.verify",
}

__all__ = [
    "AdapterWriter",
    "LayoutOptions",
    "LorashardError",
    "Part",
    "Placement",
    "PublishCallback",
    "Publisher",
    "ShardDirectory",
    "SplitRequest",
    "TensorFile",
    "__version__",
    "convert_shards",
    "inspect_path",
    "merge_shards",
    "open_shards",
    "plan_split",
    "pull_shards",
    "push_shards",
    "reshard_shards",
    "run_doctor",
    "save_megatron",
    "save_sharded",
    "split_adapter",
    "split_adapters",
    "verify_shards",
]


def __dir__() -> list[str]:
    """What completion and `help(lorashard)` show: the API, though nothing of it is imported yet."""
    return sorted([*__all__, "errors"])


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module(f"{__name__}.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
