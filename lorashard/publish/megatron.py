"""A model that Megatron-Core shards, with Megatron-Bridge's LoRA -> a shard directory.

In: on every rank Megatron-Bridge's AutoBridge, and the model. Out: what `split` would write of what
`save_hf_adapter` would. That function gathers each expert over all EP ranks; here each rank gives the
writer its own, see `bridged`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from lorashard.adapter.options import LayoutOptions
from lorashard.publish.bridged import BridgedAdapters
from lorashard.publish.peft_models import process_group
from lorashard.publish.writer import AdapterWriter, make_and_commit
from lorashard.shards.expert_map import ExpertMap
from lorashard.shards.manifest import Manifest
from lorashard.vllm_options import Strategy

_DEFAULT_OPTIONS = LayoutOptions()


def save_megatron(
    bridge: Any,
    model: Sequence[Any],
    lora: Any,
    out: str | os.PathLike[str],
    *,
    ep_size: int,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    options: LayoutOptions = _DEFAULT_OPTIONS,
    base_model: str | None = None,
    barrier: Callable[[], object] | None = None,
    force: bool = False,
    sync: bool = True,
) -> Manifest:
    """Write the LoRA of a Megatron model as a shard directory. Every rank calls it.

    bridge: Megatron-Bridge's AutoBridge. model: this rank's parts of the model. lora: the LoRA, or
    CanonicalLoRA, that it was trained with. base_model: its name or path; None = what the bridge has.
    ep_size: of the servers; with strategy, expert_map, options, force, sync as for `split`.
    barrier: of all ranks of torch.distributed; None = its own.
    Raises UnsupportedAdapterError for what only the bridge's own export can put together; AdapterError
    or ShardError, as AdapterWriter does.
    """
    rank, world_size, own_barrier = process_group()

    def writer() -> AdapterWriter:
        adapters = BridgedAdapters(bridge, model)
        adapters.refuse_unknown()
        base = bridge.hf_pretrained
        base_config = getattr(base, "config", base)
        made = AdapterWriter(
            out,
            adapters.peft_config(lora, base_model or _name_of(base)),
            ep_size=ep_size,
            strategy=strategy,
            expert_map=expert_map,
            model=base_config.to_dict(),
            options=options,
            rank=rank,
            world_size=world_size,
            force=force,
            sync=sync,
        )
        adapters.give_own(made)
        return made

    return make_and_commit(writer, out, rank, world_size, barrier or own_barrier)


def _name_of(base: Any) -> str:
    return str(getattr(base, "model_name_or_path", "") or getattr(base, "name_or_path", ""))
