"""The part of docs/gpu.md about experts that move: results of `tests.gpu.eplb` and `eplb_cost`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.gpu.eplb_cases import CASES
from tests.gpu.step_figures import middle_half

Result = Mapping[str, Any]

EPLB = """
Two {gpu} in one host. Every engine rearranges its experts all the time: after 4 steps, or as soon as EPLB's thread is done, by vLLM's own
policy and in the last round by maps at random, so that nearly every expert moves. In between, five adapters take turns in 2 slots and 3
places in host memory: they are loaded, evicted, and loaded again, plain and as shards, one tensor per expert, fused, and of half of the
experts, while other requests decode with other adapters. Each answer is judged as above. "Steps" counts decode steps and checks, "moved" how
many slots were found to hold another expert than at the look before.

What is marked ¹ is of the plugin that sent LoRA as vLLM sends weights, a message for each expert and tensor; now it is one for each tensor.
vLLM without lorashard cannot load an adapter where there are redundant experts. vLLM 0.24.0 loads no weights for those of GLM-4-MoE, so that
the base model itself is wrong (0.09 instead of 0.02); the plugin refuses that, and 0.24.0's cases with redundant experts are of a Qwen3-MoE.
"""
COST = """
A rearrangement by `EplbState.rearrange`, GLM-4.5-Air's shapes with 8 MoE layers in bf16, 128 experts on two ranks, r = 32, maps at random;
medians, and between which values the middle half of them lies. "Time", and "bytes", which is what travels, are beside vLLM without LoRA. On
two {gpu}. These are of a plugin that made tables of the LoRA for each rearrangement; now they are made once, and the CPU, which takes longer
for a rearrangement than the GPUs do, has a third of the work.
"""


def eplb_part(documents: Iterable[Mapping[str, Any]]) -> str:
    """All of it; empty without results."""
    found = [
        (str(document["release"]), document["eplb"]) for document in documents if "eplb" in document
    ]
    if not found:
        return ""
    gpus = sorted({str(of_run.get("gpu", "GPUs")) for _, of_run in found})
    parts = [EPLB.format(gpu=", ".join(gpus)).strip(), _answers(found), _servers(found)]
    if cost := _costs(found):
        gpus = sorted(
            {str(of_run["cost"].get("gpu", gpus[0])) for _, of_run in found if "cost" in of_run}
        )
        parts += [COST.format(gpu=", ".join(gpus)).strip(), cost]
    return "\n\n".join(filter(None, parts))


def _answers(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = [
        "| release | engine | | right | error (base) | before experts moved | steps | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {case.name: number for number, case in enumerate(CASES)}
    for release, of_run in found:
        who = "without lorashard" if of_run["stock"] else "with lorashard"
        engines = [case for case in of_run["cases"] if case["case"] in order]
        for engine in sorted(engines, key=lambda case: order[case["case"]]):
            rows.append(
                f"| {release}{_mark(engine)} | {engine['flags']} | {who} | {_cells(engine)} |"
            )
    return "\n".join(rows)


def _mark(run: Result) -> str:
    return "¹" if run.get("earlier") else ""


def _cells(engine: Result) -> str:
    judged = [line for line in engine["results"] if "adapter" in line]
    moved = [line for line in judged if line["round"] > 0]
    right = [line for line in moved if line["right"]]
    base = next((f"{x['error']:.3f}" for x in engine["results"] if x.get("base")), "–")
    last = next((line for line in engine["results"] if "finished" in line), {})
    before = [line for line in judged if line["round"] == 0]
    at_rest = _span(before) if before else "–"
    counts = f"{last.get('steps', '–')} | {last.get('moved', '–')}"
    return f"{len(right)} of {len(moved)} | {_span(moved)} ({base}) | {at_rest} | {counts}"


def _span(lines: Sequence[Result]) -> str:
    errors = [line["error"] for line in lines if "error" in line]
    return f"{min(errors):.3f} to {max(errors):.3f}" if errors else "no answer"


def _servers(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = []
    for release, of_run in found:
        for server in (case for case in of_run["cases"] if case["case"] == "eplb_server"):
            checks = server.get("checks", [])
            right = sum(bool(check["right"]) for check in checks)
            low, high = server.get("errors", (0.0, 0.0))
            lines.append(
                f"`vllm serve` {release}{_mark(server)}, FP8, async, 4 redundant experts, requests for the base model "
                f"and three adapters all the time: {right} of {len(checks)} checks are right, errors "
                f"{low:.3f} to {high:.3f}, {server.get('rearrangements', 0)} rearrangements, in which "
                "an adapter is loaded and unloaded at run time in each of four rounds."
            )
    return "\n\n".join(lines)


def _costs(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = ["| release | communicator | adapters | s | time | bytes |", "|---|---|---|---|---|---|"]
    for release, of_run in found:
        for communicator, engines in of_run.get("cost", {}).items():
            summary = engines.get("summary", {}) if isinstance(engines, dict) else {}
            if not summary or communicator not in engines:  # of one engine: nothing to compare
                continue
            without = engines[communicator]["seconds"]["0"]
            start = f"| {release} | {communicator}"
            rows.append(f"{start} | without LoRA | {_middle(summary['without_s'], without)} | | |")
            for count, seconds in engines[f"{communicator}:lora"]["seconds"].items():
                figures = summary[f"{count} adapters"]
                rows.append(
                    f"{start} | {count} | {_middle(figures['s'], seconds)} | "
                    f"{figures['ratio']:.2f}× | {figures['bytes_ratio']:.2f}× |"
                )
    return "\n".join(rows) if len(rows) > 2 else ""


def _middle(median: float, seconds: Sequence[float]) -> str:
    low, high = middle_half(seconds)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"
