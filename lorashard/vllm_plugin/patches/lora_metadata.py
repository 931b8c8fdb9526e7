"""What vLLM's LoRA kernels are told of a step in which other engines' tokens come as well.

vLLM writes the metadata of own tokens; the kernels of MoE LoRA compute for all tokens with it. What they
need beyond: slots that only other engines' tokens use among the active ones, no skipping as long as any
engine uses LoRA, and a mapping of own tokens that says -1 for each that has none, padding included, as
it is sent to the others. Kernels of dense layers find no tokens for the other slots.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from lorashard.vllm_plugin.engine.live import moe_wrappers

_LAST = "_lorashard_last_metadata"  # an attribute of vLLM's LoRAModelManager


def write_metadata(manager: Any, mapping: Any | None, slots: Sequence[int]) -> None:
    """Write it for a step. manager: a LoRAModelManager. mapping: of own tokens. slots: of all engines' tokens."""
    state = (mapping, tuple(manager.lora_index_to_id), tuple(slots))
    if getattr(manager, _LAST, None) == state:
        return
    metas = {
        id(meta): meta
        for layer in moe_wrappers(manager).values()
        for meta in (layer.punica_wrapper.token_mapping_meta,)
    }
    for meta in metas.values():
        meta.token_lora_mapping.fill_(-1)
    manager._last_mapping = None  # noqa: SLF001 - of a step before
    manager.set_adapter_mapping(_without_lora() if mapping is None else mapping)
    ids = () if mapping is None else set(mapping.index_mapping)
    own = {manager.lora_index_to_id.index(number) for number in ids if number > 0}
    has_base = any(number <= 0 for number in ids)
    for meta in metas.values():
        _add_slots(meta, len(own), [slot for slot in slots if slot not in own], has_base=has_base)
    setattr(manager, _LAST, state)


def _add_slots(meta: Any, num_own: int, others: Sequence[int], *, has_base: bool) -> None:
    """Add slots to a LoRAKernelMeta of vLLM's.

    It has the own tokens' slots in order, behind -1 if some have no LoRA, and nothing if none has.
    The first of the others takes the place of -1, with no tokens, which comes to the same: so that no
    more than max_loras are active, since kernels of some releases look at no more.
    """
    if not others:
        return
    count = num_own
    if num_own and has_base:
        meta.active_lora_ids[0] = others[0]
        meta.num_tokens_per_lora[0] = 0
        others, count = others[1:], num_own + 1
    if others:
        active = meta.active_lora_ids
        active[count : count + len(others)].copy_(active.new_tensor(others))
        count += len(others)
    captured = meta.captured_lora_counts
    place = bisect.bisect_left(captured, count)
    meta.num_active_loras_cpu.fill_(captured[place] if place < len(captured) else count)
    meta.no_lora_flag_cpu.fill_(False)


def _without_lora() -> Any:
    from vllm.lora.layers import LoRAMapping

    return LoRAMapping((0,), (0,), is_prefill=True)
