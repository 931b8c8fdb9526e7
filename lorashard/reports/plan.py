"""What a split would give each rank. Reads headers only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.options import LoraBLayout, Orientation
from lorashard.inspect.picture import ModuleExperts, experts_of_layout
from lorashard.inspect.summary import summarize_plan
from lorashard.shards.expert_map import ExpertMap
from lorashard.shards.placement import Placement
from lorashard.split.pipeline import SplitRequest, prepared_split, request_of
from lorashard.storage.remote import locate
from lorashard.vllm_options import Strategy


@dataclass(frozen=True, slots=True)
class PlannedSplit:
    """The document of a plan, and what it is of.

    dtype: what the split would cast to, as safetensors names it. source_bytes: of the adapter's file.
    """

    document: dict[str, Any]
    layout: AdapterLayout
    placement: Placement
    dtype: str | None
    source_bytes: int

    def experts(self) -> tuple[ModuleExperts, ...]:
        """The experts of each module, as a page draws them."""
        return experts_of_layout(self.layout, self.placement, self.dtype)


def plan_split(
    adapter: str | os.PathLike[str],
    ep_size: int | SplitRequest,
    *,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    lora_b_layout: LoraBLayout | None = None,
    orientation: Orientation | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    max_loras: int = 1,
    max_lora_rank: int | None = None,
) -> dict[str, Any]:
    """What a split would give each rank: the document of `lorashard plan --json`, and its `notes`.

    Experts, bytes on disk and to read, vLLM's GPU buffers, host memory; all sizes in bytes.
    adapter ... allow_pickle: as for `split_adapter`. max_loras, max_lora_rank: vLLM's; by default 1
    and the adapter's largest r. Raises AdapterError or PlacementError.
    """
    request = request_of(
        ep_size,
        strategy=strategy,
        expert_map=expert_map,
        model=model,
        num_experts=num_experts,
        lora_b_layout=lora_b_layout,
        orientation=orientation,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    return examine_split(adapter, request, max_loras, max_lora_rank).document


def examine_split(
    adapter: str | os.PathLike[str],
    request: SplitRequest,
    max_loras: int,
    max_lora_rank: int | None,
) -> PlannedSplit:
    """The same, with what a page is drawn from."""
    with prepared_split(locate(adapter), request) as prepared:
        largest = max(module.lora_rank for module in prepared.layout.modules)
        summary = summarize_plan(
            prepared.layout,
            prepared.placement,
            prepared.plan,
            max_loras,
            max_lora_rank or largest,
        )
        return PlannedSplit(
            {"adapter": os.fspath(adapter), **summary, "notes": list(prepared.notes)},
            prepared.layout,
            prepared.placement,
            request.stored_dtype,
            prepared.source.index.file_size,
        )
