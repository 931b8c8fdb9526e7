"""The part of docs/gpu.md about the time of a step: results of `tests.gpu.tp_speed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SPEED = """
`vllm serve -tp 2 --enable-expert-parallel` on two {gpu}, GLM-4.5-Air's shapes with 8 MoE layers in bf16, r = 32, CUDA graphs. {measured}
"""
# Also of dp_report.
MEASURED = """
Decode, prompts of 32 tokens for which 64 are generated: the time from the begin of a step to the next, while all requests are in both. Prefill,
prompts of 960 tokens: the GPU's time for a step by its tokens, of steps of 8,192, or of all prompts if these are fewer. Taken in the
worker, on the first rank, while every engine takes such steps. All servers run at the same time, each on CPUs of its own, and are asked in turn.
Lower quartiles of the steps of all rounds, since what else a host does only adds to a step, and does so for seconds at a time; behind them medians.
The goal is at most 1.03 times stock.
""".strip()


def speed_part(documents: Iterable[Mapping[str, Any]]) -> str:
    """All of it; empty without results."""
    found = [(str(d["release"]), d["tp_speed"]) for d in documents if "tp_speed" in d]
    if not found:
        return ""
    columns = {"stock": "without lorashard", "plugin": "with lorashard"}
    text = SPEED.format(gpu=gpu_names(found), measured=MEASURED)
    return "\n\n".join([text.strip(), speed_table(found, columns)])


def gpu_names(found: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Their names, of all runs."""
    return ", ".join(sorted({speeds["gpu"] for _, speeds in found}))


def speed_table(found: Sequence[tuple[str, Mapping[str, Any]]], columns: Mapping[str, str]) -> str:
    """A row for each release and workload. columns: the kinds of servers, and what each is called.

    The ratio is the one that was written, of lorashard to stock.
    """
    rows = [
        f"| release | | {' | '.join(columns.values())} | ratio |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for release, speeds in found:
        servers = speeds["servers"]
        for what in dict.fromkeys(what for asked in servers.values() for what in asked):
            cells = [_cell(servers.get(kind, {}).get(what)) for kind in columns]
            ratio = speeds["ratios"].get(what)
            shown = "–" if ratio is None else f"{ratio:.3f}"
            rows.append(f"| {release} | {what} | {' | '.join(cells)} | {shown} |")
    return "\n".join(rows)


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None or figures["median"] is None:
        return "–"
    return f"{figures['quartile']:.3f} {figures['unit']} ({figures['median']:.3f})"
