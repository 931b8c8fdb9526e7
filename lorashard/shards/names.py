"""What the files of a shard directory are called, and the directory itself. Pure values."""

from __future__ import annotations

import re

MANIFEST_NAME = "lorashard.json"
REPLICATED_NAME = "replicated.safetensors"

_EP_SUFFIX = re.compile(r"(?<=.)-ep\d+$")
# transformers counts every directory whose name begins like this as a checkpoint, and deletes the
# oldest beyond `save_total_limit` (trainer_utils.py, `rotate_checkpoints`).
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_EP_PREFIX = re.compile(r"^ep\d+-of-(?=checkpoint-\d)")


def rank_file_name(ep_rank: int, ep_size: int) -> str:
    """`ep-00003-of-00008.safetensors`: the experts of ep rank 3."""
    return f"ep-{ep_rank:05d}-of-{ep_size:05d}.safetensors"


def shard_file_names(ep_size: int) -> tuple[str, ...]:
    """The tensor files of a directory: the replicated one, then one per ep rank."""
    return (REPLICATED_NAME, *(rank_file_name(rank, ep_size) for rank in range(ep_size)))


def directory_name(adapter: str, ep_size: int) -> str:
    """`my-adapter-ep8`: what `split` calls the shards of an adapter.

    Those of `checkpoint-130` are called `ep8-of-checkpoint-130`.
    """
    if _CHECKPOINT.match(adapter):
        return f"ep{ep_size}-of-{adapter}"
    return f"{adapter}-ep{ep_size}"


def adapter_name(directory: str) -> str:
    """`my-adapter`: the name of a shard directory without what `split` adds to it."""
    name = _EP_PREFIX.sub("", directory)
    return _EP_SUFFIX.sub("", directory) if name == directory else name
