"""Hypothesis strategies for adapters and placements, and adapters as lorashard's values."""

from __future__ import annotations

import json
from typing import Any

import torch
from hypothesis import strategies as st

from lorashard.adapter.config import AdapterIndex, parse_config
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.header import build_header
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, ONE_TENSOR_PER_EXPERT, Adapter, Spec

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
COMMON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def index_of(adapter: Adapter) -> AdapterIndex:
    """What reading the adapter's files would give."""
    tensors = [(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in adapter.tensors.items()]
    header, entries = build_header(tensors, {"format": "pt"})
    config = parse_config(json.dumps(adapter.config).encode(), "adapter_config.json")
    end = entries[-1].end if entries else len(header)
    return AdapterIndex(config, entries, len(header), end)


def layout_of(adapter: Adapter, **options: Any) -> AdapterLayout:
    """What lorashard makes of the adapter; options: LayoutOptions fields beside its own."""
    told = LayoutOptions(**(adapter.options | options))
    return detect_layout(index_of(adapter), told, "adapter")


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    layouts: tuple[str, ...] = LAYOUTS,
    fill: str = "random",
) -> Spec:
    """Any adapter that lorashard can split, in one dtype."""
    layout = draw(st.sampled_from(layouts))
    num_experts = draw(st.integers(1, 9))
    lora_rank = draw(st.integers(1, 4))
    experts, lora_ranks = None, {}
    if layout in ONE_TENSOR_PER_EXPERT:
        some = st.sets(st.integers(0, num_experts - 1), min_size=1)
        experts = draw(st.none() | some.map(lambda chosen: tuple(sorted(chosen))))
        lora_ranks = draw(st.dictionaries(st.integers(0, num_experts - 1), st.integers(1, 5)))
    # A shared pair whose r is a multiple of E is read only beside other tensors of that r.
    extras = draw(st.booleans()) or (layout == "L11" and lora_rank % num_experts == 0)
    return Spec(
        layout=layout,
        num_experts=num_experts,
        num_layers=draw(st.integers(1, 2)),
        lora_rank=lora_rank,
        hidden=draw(st.integers(1, 9)),
        intermediate=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from((*COMMON_DTYPES, torch.float64))),
        fill=fill,
        seed=draw(st.integers(0, 2**16)),
        gated=layout not in NON_GATED_LAYOUTS or draw(st.booleans()),
        extras=extras,
        experts=experts,
        lora_ranks=lora_ranks,
        rslora=draw(st.booleans()),
        peft_version=draw(st.sampled_from(["0.21.2", "0.18.1"])),
    )


@st.composite
def rank_lists(draw: st.DrawFn, num_experts: int, ep_size: int) -> list[list[int]]:
    """Slot orders of all ranks: every expert at least once, some of them redundant."""
    order = draw(st.permutations(range(num_experts)))
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    for expert in order:
        for rank in draw(st.sets(st.integers(0, ep_size - 1), min_size=1, max_size=2)):
            ranks[rank].append(expert)
    return ranks
