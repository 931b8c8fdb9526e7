"""The part of docs/gpu.md about tokens a second: results of `tests.gpu.tp_speed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SPEED = """
`vllm serve -tp 2 --enable-expert-parallel` on two {gpu}, GLM-4.5-Air's shapes with 8 MoE layers in bf16, r = 32, CUDA graphs. Decode: prompts of
32 tokens, 128 are generated. Prefill: prompts of 960 tokens, one is generated. Both servers run at the same time and are asked in turn; medians
of the rounds, and the middle half of them as a part of the median.
"""


def speed_part(documents: Iterable[Mapping[str, Any]]) -> str:
    """All of it; empty without results."""
    found = [(str(d["release"]), d["tp_speed"]) for d in documents if "tp_speed" in d]
    if not found:
        return ""
    rows = [
        "| release | | without lorashard | with lorashard | ratio |",
        "|---|---|---|---|---|",
    ]
    for release, speeds in found:
        stock, plugin = speeds["servers"]["stock"], speeds["servers"]["plugin"]
        for what, of in stock.items():
            ratio = plugin[what]["tokens_a_second"] / of["tokens_a_second"]
            cells = " | ".join(_cell(figures) for figures in (of, plugin[what]))
            rows.append(f"| {release} | {what} | {cells} | {ratio:.3f} |")
    gpus = ", ".join(sorted({speeds["gpu"] for _, speeds in found}))
    return "\n\n".join([SPEED.format(gpu=gpus).strip(), "\n".join(rows)])


def _cell(figures: Mapping[str, Any]) -> str:
    return f"{figures['tokens_a_second']:,.0f} (± {figures['spread'] / 2:.1%})"
